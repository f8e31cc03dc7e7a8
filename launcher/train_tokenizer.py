"""Train the multi-scale VQ-VAE: `deepspeed launcher/train_tokenizer.py --config configs/tokenizer.json [key=value …]`.

Also starts under torchrun and, for one process, under plain python. The same command resumes from the last checkpoint;
the run folder becomes the tokenizer's folder. SIGTERM, SIGUSR1, Ctrl-C and a file STOP in the run folder end it after a
save; a file SAVE only saves.
"""

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher, not by people")
    arguments = parser.parse_intermixed_args()

    from star_dist.config import TokenizerTrainConfig, load_config
    from star_dist.process import prepare_process_environment

    config = load_config(TokenizerTrainConfig, arguments.config, arguments.overrides)
    process = prepare_process_environment(config.omp_threads)

    from star_dist.tokenizer.train import train_tokenizer

    train_tokenizer(config, process)


if __name__ == "__main__":
    run_command(main)
