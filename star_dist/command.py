"""The `star-dist` command. Imports no torch before a subcommand runs."""

from __future__ import annotations

import argparse
import ipaddress
from functools import partial

from star_dist.cli import command_parser, run_command
from star_dist.errors import UserError
from star_dist.inference.arguments import add_model_arguments, load_pipeline
from star_dist.serve.limits import Limits

DESCRIPTION = "Draw with an exported model: `star-dist serve runs/demo/export`, then open http://127.0.0.1:7860."


def main() -> None:
    run_command(_main)


def _main() -> None:
    parser = command_parser(DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="serve")
    serve = commands.add_parser("serve", help="a page and a batch API to draw with a model")
    add_model_arguments(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=int, default=7860, help="port, 0 for any free one (default 7860)")
    defaults = Limits()
    for flag, default, limit in (
        ("--max-pictures", defaults.pictures, "of one drawing; fewer where memory is short"),
        ("--max-prompt-letters", defaults.prompt_letters, "letters of a prompt"),
        ("--max-waiting", defaults.waiting, "drawings that may wait"),
        ("--keep", defaults.kept, "finished drawings kept in memory"),
        ("--keep-mb", defaults.kept_bytes // 10**6, "MB that they may take"),
    ):
        serve.add_argument(flag, type=int, default=default, metavar="N", help=f"{limit} (default {default})")
    _serve(parser.parse_args())


def _serve(arguments: argparse.Namespace) -> None:
    for flag in ("max_pictures", "max_prompt_letters", "max_waiting", "keep", "keep_mb"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be positive, got {getattr(arguments, flag)}")
    if not 0 <= arguments.port < 2**16:
        raise UserError(f"--port must lie in 0..65535, got {arguments.port}")
    limits = Limits(
        pictures=arguments.max_pictures,
        prompt_letters=arguments.max_prompt_letters,
        waiting=arguments.max_waiting,
        kept=arguments.keep,
        kept_bytes=arguments.keep_mb * 10**6,
    )
    try:
        from star_dist.serve.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise UserError(f"{error.name} is not installed; pip install -e '.[serve]' in its checkout") from None
    serve(partial(load_pipeline, arguments), arguments.host, arguments.port, limits, _is_loopback(arguments.host))


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
