"""The model card of an inference folder: the run's facts for people, in the form that the Hugging Face hub reads."""

from __future__ import annotations

from typing import Any

from star_dist.config import Section

LIBRARY = "star-dist"
PAPER = "https://arxiv.org/abs/2406.10797"


class ModelFacts(Section):
    """What is known of how the weights came to be; empty where it is not known.

    source: the training run, or the files that were converted. licence: as the hub names it (apache-2.0,
    cc-by-sa-4.0, …). samples: pictures of each split. attribution: what the data's licence asks to be said.
    training: options of the run, by dotted name. metrics: the last report up to the exported step. versions: packages
    and git commit of the training.
    """

    source: str = ""
    licence: str | None = None
    dataset: str = ""
    samples: dict[str, int] = {}
    attribution: str = ""
    training: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    versions: dict[str, str | None] = {}


def model_card(values: dict[str, Any]) -> str:
    """README.md of an inference folder. values: its `config.json`."""
    from huggingface_hub import ModelCardData

    facts, model = values["facts"], values["model"]
    data = ModelCardData(
        license=facts["licence"],
        library_name=LIBRARY,
        pipeline_tag="text-to-image",
        tags=["star", "scale-wise", "visual-autoregressive", "text-to-image"],
    )
    side = values["resolution"]
    encoder = values["text"]["encoder"]
    lines = [
        "---",
        data.to_yaml().strip(),
        "---",
        "",
        f"# {values['run_name']}",
        "",
        f"A [STAR]({PAPER}) text-to-image model that draws {side} x {side} pictures, scale by scale: a transformer of "
        f"depth {model['depth']} predicts token maps of sides {', '.join(map(str, model['scales']))}, each from all "
        f"smaller ones and from the text, and a multi-scale VQ-VAE turns them into pixels.",
        "",
        "```python",
        "from star_dist.inference.pipeline import StarPipeline",
        "",
        'pipeline = StarPipeline.from_pretrained("path/to/this/folder")',
        'pipeline("a red heart", seed=1)[0].save("heart.png")',
        "```",
        "",
        *_table(
            "Model",
            {
                "depth, width, heads": f"{model['depth']}, {model['width']}, {model['heads']}",
                "scales": ", ".join(map(str, model["scales"])),
                "codebook": f"{model['vocab_size']} codes of {model['code_dim']} channels",
                "positions": f"{model['positions']}, convention {model['rope_convention']}",
                "text encoder": f"{encoder} (width {values['text']['width']}, {values['text']['max_tokens']} tokens)",
                "stored as": values["dtype"],
                "tokenizer": values["tokenizer_hash"],
                "licence": facts["licence"] or "not stated",
            },
        ),
        *_table("Where it is from", {"source": facts["source"], "step": values["step"] or "", "data": facts["dataset"],
                                     **{f"pictures, {split}": count for split, count in facts["samples"].items()}}),
        *_table("Training", facts["training"]),
        *_table("Metrics at the end", {name: f"{value:.6g}" for name, value in facts["metrics"].items()}),
        *_table("Made with", facts["versions"]),
    ]  # fmt: skip
    if facts["attribution"]:
        lines += ["## Attribution of the data", "", facts["attribution"], ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(title: str, rows: dict[str, Any]) -> list[str]:
    """A titled table of the rows that have a value; nothing where none has."""
    known = {name: value for name, value in rows.items() if value not in ("", None)}
    if not known:
        return []
    cells = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in known.items()]
    return [f"## {title}", "", "| | |", "|---|---|", *cells, ""]
