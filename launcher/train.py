"""Train STAR: `deepspeed launcher/train.py --config configs/d30.json [section.key=value …]`.

The same command resumes from the newest complete checkpoint of the run folder. Also starts under torchrun and, for one
process, under plain python. --dry-run prints what the run would be and exits; it needs no GPU and no data.
"""

from star_dist.cli import add_config_arguments, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters, FLOPs, memory and exit")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs that --dry-run reckons with (default 1)")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher, not by people")
    arguments = parser.parse_intermixed_args()

    from star_dist.config import RunConfig, load_config
    from star_dist.errors import UserError
    from star_dist.process import prepare_process_environment

    config = load_config(RunConfig, arguments.config, arguments.overrides)
    if arguments.dry_run:
        if arguments.gpus < 1:
            raise UserError(f"--gpus must be positive, got {arguments.gpus}")
        from star_dist.train.dry_run import describe

        print(describe(config, arguments.gpus))
        return
    process = prepare_process_environment(config.train.omp_threads)

    from star_dist.train.run import train

    train(config, process)


if __name__ == "__main__":
    run_command(main)
