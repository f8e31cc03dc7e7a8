"""Loss and accuracy on held-out pictures: `python launcher/evaluate.py runs/d30` or `… exports/d30 --config FILE`.

For a run folder, its newest complete checkpoint (or that of --step); for an export, its weights; both in the config's
train.precision, as in training. The result, JSON on stdout and in --out, is what training reports as validation/…, over
--num-samples held-out pictures.
"""

from star_dist.cli import check_is_no_folder, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("model", metavar="DIR", help="run folder, or inference folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change single values of the config")
    parser.add_argument("--config", metavar="FILE", help="config of the data (default: the run folder's own)")
    parser.add_argument("--step", type=int, help="optimizer step of the checkpoint (default: the newest)")
    parser.add_argument("--num-samples", type=int, help="held-out pictures (default: validation.num_samples)")
    parser.add_argument("--out", metavar="FILE", help="JSON file to write")
    arguments = parser.parse_intermixed_args()

    import json
    from pathlib import Path

    from star_dist.config import RunConfig, load_config
    from star_dist.errors import UserError
    from star_dist.files import write_text_atomically
    from star_dist.process import prepare_process_environment
    from star_dist.run_folder import CONFIG_FILE, is_export

    folder = Path(arguments.model)
    if is_export(folder) and not arguments.config:
        raise UserError(f"{folder} is an export, which knows no data; name the config of its data with --config")
    overrides = list(arguments.overrides)
    if arguments.num_samples is not None:
        overrides.append(f"validation.num_samples={arguments.num_samples}")
    config = load_config(RunConfig, arguments.config or folder / CONFIG_FILE, overrides)
    if arguments.out:  # one that cannot be is found before anything is evaluated
        check_is_no_folder(Path(arguments.out))
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    prepare_process_environment(config.train.omp_threads)

    from star_dist.train.evaluation import evaluate

    result = json.dumps(evaluate(folder, config, arguments.step), indent=2)
    print(result)
    if arguments.out:
        write_text_atomically(Path(arguments.out), result + "\n")


if __name__ == "__main__":
    run_command(main)
