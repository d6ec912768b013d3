"""The oracle of each family against code that nobody here wrote: transformers' models, in float32.

Random weights are saved as publishers save them (packed by the library's own `pack_weights`), loaded by
`from_pretrained`, which puts the library's BitLinear or AutoBitLinear in place, and read by
`open_checkpoint`. 1bitLLM's graph is not in transformers: tests/engine/one_bit.py has it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.formats.h1b import unpack_codes
from engine.formats.hf import open_checkpoint
from engine.model import Model
from engine.ppl import Protocol, score
from engine.reference import Reference
from tests.engine.test_families import model_of
from tests.engine.test_reference import agreement

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
bitnet = pytest.importorskip("transformers.integrations.bitnet")
torch._dynamo.config.disable = True
OneBit = pytest.importorskip("tests.engine.one_bit").OneBit

SLOW = pytest.mark.skipif(not os.environ.get("HALO_TEST_SLOW"), reason="HALO_TEST_SLOW is not set")
QUANTIZATION: dict[str, dict[str, Any]] = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "autobitlinear": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {},
    "masters": {},
}
# heads x head_dim, KV heads, hidden, intermediate, layers, vocabulary, tied, theta, eps
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": dict(
        num_attention_heads=4, num_key_value_heads=2, hidden_size=128, intermediate_size=320,
        num_hidden_layers=3, vocab_size=301, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=5e5,
    ),
    "untied": dict(
        num_attention_heads=6, num_key_value_heads=1, hidden_size=96, intermediate_size=256,
        num_hidden_layers=2, vocab_size=500, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1e4,
    ),
    "mha": dict(
        num_attention_heads=4, num_key_value_heads=4, hidden_size=128, intermediate_size=352,
        num_hidden_layers=3, vocab_size=400, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=1e4,
    ),
    "wide heads": dict(  # Falcon3's: heads x head_dim is not the hidden size
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_size=128, intermediate_size=256,
        num_hidden_layers=2, vocab_size=400, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1000042,
    ),
    "2B-4T": dict(
        num_attention_heads=20, num_key_value_heads=5, hidden_size=2560, intermediate_size=6912,
        num_hidden_layers=2, vocab_size=512, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=5e5,
    ),
    "Falcon3-7B": dict(
        num_attention_heads=12, num_key_value_heads=4, head_dim=256, hidden_size=3072,
        intermediate_size=23040,
        num_hidden_layers=1, vocab_size=512, tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1000042,
    ),
    "Llama3-8B": dict(
        num_attention_heads=32, num_key_value_heads=8, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=1, vocab_size=512, tie_word_embeddings=False, rms_norm_eps=1e-5, rope_theta=5e5,
    ),
    "bitnet_b1_58-3B": dict(
        num_attention_heads=32, num_key_value_heads=32, hidden_size=3200, intermediate_size=8640,
        num_hidden_layers=1, vocab_size=512, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_theta=1e4,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small products on many threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config_of(family: str, shape: str) -> Any:
    sizes = dict(SHAPES[shape], max_position_embeddings=96)
    rope = {"rope_type": "default", "rope_theta": sizes["rope_theta"]}
    kind = transformers.BitNetConfig if family == "BitNet" else transformers.LlamaConfig
    plain = {key: value for key, value in sizes.items() if key != "rope_theta"}
    return kind(**plain, rope_parameters=rope, bos_token_id=None, eos_token_id=None)


def randomised(model: Any) -> Any:
    """Weights that leave no part without influence: every product keeps the size of what comes in.

    So attention is neither even nor one position's, and the logits are of the size that a softmax takes.
    Norms are not one. Else the graph could be wrong unseen: see test_a_wrong_graph_is_seen.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=generator)
    return model.to(torch.bfloat16)


def saved(directory: Path, family: str, shape: str, form: str) -> Path:
    """A checkpoint in `directory` in the given form, its tensors named and packed by the library."""
    config = config_of(family, shape)
    classes = {"BitNet": "BitNetForCausalLM", "Llama": "LlamaForCausalLM", "1bitLLM": "BitnetForCausalLM"}
    built = OneBit(config) if family == "1bitLLM" else getattr(transformers, classes[family])(config)
    state = {name: value.contiguous() for name, value in randomised(built).state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if "bitlinear" in form:
        for name in [name for name in state if name.endswith("_proj.weight")]:
            weights = state[name].float()
            mean = weights.abs().mean()
            state[name] = bitnet.pack_weights((weights / mean).round().clamp(-1, 1))
            scale = 1 / mean if form == "bitlinear" else mean
            state[f"{name}_scale"] = scale.to(torch.bfloat16).reshape(1)
    directory.mkdir()
    said = config.to_dict() | {"architectures": [classes[family]]}
    if form != "masters":
        said["quantization_config"] = {"quant_method": "bitnet"} | QUANTIZATION[form]
    (directory / "config.json").write_text(json.dumps(said))
    safetensors.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def loaded(directory: Path, family: str, shape: str, wide: bool) -> Any:
    """The library's model of the checkpoint, in bfloat16 or with everything but the codes in float32.

    It is loaded in bfloat16 first: asked for float32, the library multiplies bf16 scales with float32.
    """
    if family == "1bitLLM":
        theirs = OneBit(config_of(family, shape)).to(torch.bfloat16)
        theirs.load_state_dict(safetensors.load_file(directory / "model.safetensors"))
    else:
        kind = transformers.AutoModelForCausalLM
        theirs = kind.from_pretrained(directory, dtype=torch.bfloat16)
    if wide:
        torch.nn.Module.float(theirs)
        for module in theirs.modules():
            if isinstance(module, bitnet.BitLinear):
                module.dtype = torch.float32
    return theirs.eval()


def logits_of(model: Any, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found = model(torch.tensor([list(tokens)]))
    return np.asarray(getattr(found, "logits", found)[0].float().numpy())


def states_of(model: Any, tokens: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """The residual stream: into the first layer, and out of each."""
    states: list[np.ndarray[Any, Any]] = []

    def keep(_module: Any, inputs: Any, output: Any) -> None:
        if not states:
            states.append(inputs[0].reshape(len(tokens), -1).float().numpy())
        output = output[0] if isinstance(output, tuple) else output
        states.append(output.reshape(len(tokens), -1).float().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return states


def divergence(truth: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The mean of KL(truth || other) over the positions, in nats."""

    def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        wide = logits.astype(np.float64)
        wide -= wide.max(axis=-1, keepdims=True)
        return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))

    p, q = log_softmax(truth), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return float(((a * b).sum(axis=-1) / norms).min())


def oracle_of(model: Model) -> Reference:
    """The oracle with the KV cache in float32, as the library has it."""
    return Reference(model, "f32")


def tokens_for(oracle: Reference) -> list[int]:
    return np.random.default_rng(5).integers(0, oracle.config.vocab_size, 40).tolist()  # type: ignore[no-any-return]


def logits_after(oracle: Reference, states: Any) -> np.ndarray[Any, Any]:
    """The logits of the last hidden states, without running the layers once more."""
    return oracle._logits(states)


# Both sides quantise alike and sum integers exactly, so they differ by float32 rounding alone, 1e-7 to 1e-6
# of the deviation; until an activation lies next to a half and rounds the other way. Of 1e5 activations (of
# 1e6 at the real widths) a few (a hundred) do. Each moves what depends on it by a few 1e-3; where it comes
# early, that is every value. A wrong graph moves most values by tenths: test_a_wrong_graph_is_seen.
MEDIAN, MEDIAN_OF_A_MILLION, LARGEST = 1e-2, 3e-2, 0.3

CASES = [
    *[("BitNet", "gqa", form) for form in ("online", "autobitlinear", "bitlinear")],
    ("BitNet", "untied", "autobitlinear"),
    *[("Llama", "wide heads", form) for form in ("bitlinear", "autobitlinear")],
    ("Llama", "gqa", "bitlinear"),
    ("Llama", "untied", "online"),
    ("1bitLLM", "mha", "masters"),
    *[pytest.param(*case, marks=SLOW) for case in (
        ("BitNet", "2B-4T", "autobitlinear"),
        ("BitNet", "2B-4T", "online"),
        ("Llama", "Falcon3-7B", "bitlinear"),
        ("Llama", "Llama3-8B", "bitlinear"),
        ("1bitLLM", "bitnet_b1_58-3B", "masters"),
    )],
]  # fmt: skip


@pytest.mark.parametrize(("family", "shape", "form"), CASES)
def test_the_oracle_is_the_library(tmp_path: Path, family: str, shape: str, form: str) -> None:
    """Hidden states after each layer, logits and their distribution, in float32.

    The library's own bfloat16 is further from its float32 than we may be.
    """
    directory = saved(tmp_path / "x", family, shape, form)
    oracle = oracle_of(model_of(open_checkpoint(directory)))
    tokens = tokens_for(oracle)
    theirs = loaded(directory, family, shape, wide=True)
    states = oracle.hidden_states(tokens)
    found = [agreement(a, b) for a, b in zip(states, states_of(theirs, tokens), strict=True)]
    logits, wanted = logits_after(oracle, states[-1]), logits_of(theirs, tokens)
    found.append(agreement(logits, wanted))
    ours = divergence(wanted, logits)
    noise = divergence(wanted, logits_of(loaded(directory, family, shape, wide=False), tokens))
    print(
        f"{family}, {shape}, {form}: median {max(m for m, _ in found):.1e}, largest "
        f"{max(most for _, most in found):.1e}, cosine {cosine(logits, wanted):.6f}, KL {ours:.1e} "
        f"(of its bf16 {noise:.1e})"
    )
    bound = MEDIAN if oracle.config.hidden_size < 1024 else MEDIAN_OF_A_MILLION
    assert all(median < bound and largest < LARGEST for median, largest in found)
    assert cosine(logits, wanted) > 0.999 and ours <= noise and ours < 1e-2


WRONG: dict[str, Callable[[Model], Model]] = {
    "squared ReLU": lambda m: changed(m, activation="relu2"),
    "another theta": lambda m: changed(m, rope_theta=1e4),
    "the embedding as head": lambda m: dataclasses.replace(m, head=None),
    "the inverse of each scale": lambda m: scaled(m, lambda scales: 1 / scales),
    "absmean once more": lambda m: scaled(m, lambda scales: scales * np.float32(0.67)),
    "rows in fours, not in quarters": lambda m: dataclasses.replace(
        m, layers=[shuffled(x) for x in m.layers]
    ),
    "norms exchanged": lambda m: dataclasses.replace(
        m,
        layers=[
            dataclasses.replace(x, input_norm=x.post_attn_norm, post_attn_norm=x.input_norm) for x in m.layers
        ],
    ),
}


def changed(model: Model, **changes: Any) -> Model:
    return dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))


def scaled(model: Model, change: Callable[[Any], Any]) -> Model:
    parts = [part for part, _, _ in model.config.projections()]
    layers = []
    for layer in model.layers:
        matrices = {part: getattr(layer, part) for part in parts}
        new = {part: dataclasses.replace(x, scales=change(x.scales)) for part, x in matrices.items()}
        layers.append(dataclasses.replace(layer, **new))
    return dataclasses.replace(model, layers=layers)


def shuffled(layer: Any) -> Any:
    packed = layer.o.packed
    order = np.arange(len(packed)).reshape(4, -1).T.reshape(-1)
    return dataclasses.replace(layer, o=dataclasses.replace(layer.o, packed=packed[order]))


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_graph_is_seen(falcon3: tuple[Model, Any], mistake: str) -> None:
    """The bounds above mean something: each mistake that converters have made leaves them far behind."""
    model, theirs = falcon3
    oracle = oracle_of(WRONG[mistake](model))
    tokens = tokens_for(oracle)
    median, _ = agreement(logits_after(oracle, oracle.hidden_states(tokens)[-1]), logits_of(theirs, tokens))
    print(f"{mistake}: median {median:.2f}")
    assert median > 5 * MEDIAN


@pytest.fixture(scope="module")
def falcon3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    """(our reading, the library's in float32) of a small Falcon3: untied, wide heads, inverse scales."""
    directory = saved(tmp_path_factory.mktemp("falcon3") / "x", "Llama", "wide heads", "bitlinear")
    return model_of(open_checkpoint(directory)), loaded(directory, "Llama", "wide heads", wide=True)


def test_greedy_tokens_are_the_librarys(falcon3: tuple[Model, Any]) -> None:
    """Equal, but where the library has two tokens nearer to each other than one rounding moves them."""
    model, theirs = falcon3
    oracle, equal = oracle_of(model), 0
    for start in range(0, 16, 8):
        prompt = tokens_for(oracle)[start : start + 8]
        fed = torch.tensor([prompt])
        with torch.no_grad():
            done = theirs.generate(
                fed, attention_mask=torch.ones_like(fed), max_new_tokens=16, do_sample=False
            )
        ours, wanted = oracle.greedy(prompt, 16), done[0, len(prompt) :].tolist()
        same = next((i for i in range(16) if ours[i] != wanted[i]), 16)
        equal += same
        if same < 16:
            logits = logits_of(theirs, [*prompt, *wanted[:same]])[-1]
            assert logits[wanted[same]] - logits[ours[same]] < LARGEST * logits.std()
    print(f"{equal} of 32 greedy tokens before the first that is not the library's")
    assert equal >= 16


class WholeWindows:
    """A model of `logits(tokens)` behind the session that engine/ppl.py asks."""

    def __init__(self, logits: Callable[[Sequence[int]], Any]) -> None:
        self.logits, self.fed = logits, list[int]()

    def run(self, tokens: Any, slots: Any, positions: Any, want: Any) -> Any:
        self.fed[positions[0] :] = tokens
        return self.logits(self.fed)[positions[0] :][np.array(want, bool)]

    def close(self) -> None:
        pass


def test_perplexity_over_windows_is_the_librarys(falcon3: tuple[Model, Any], tmp_path: Path) -> None:
    """Overlapping windows; nearer to the library's float32 than its bfloat16 is, in every window's nats."""
    model, theirs = falcon3
    oracle = oracle_of(model)
    text = tokens_for(oracle) + oracle.greedy([1, 2, 3], 20)
    protocol = Protocol(window=24, stride=16, bos=7)
    directory = saved(tmp_path / "x", "Llama", "wide heads", "bitlinear")
    rough = loaded(directory, "Llama", "wide heads", wide=False)
    ours, wanted, noisy = (
        score(WholeWindows(logits), text, protocol, 64)
        for logits in (
            lambda fed: oracle.forward(fed, oracle.new_cache()),
            lambda fed: logits_of(theirs, fed),
            lambda fed: logits_of(rough, fed),
        )
    )
    away, noise = (
        sum(abs(a - b) for a, b in zip(found.nats, wanted.nats, strict=True)) for found in (ours, noisy)
    )
    print(
        f"perplexity {ours.perplexity:.4f}, the library's {wanted.perplexity:.4f}, in bf16 "
        f"{noisy.perplexity:.4f}; nats away {away:.1e}, bf16 {noise:.1e}"
    )
    assert ours.tokens == wanted.tokens == len(text)
    assert math.isclose(ours.perplexity, wanted.perplexity, rel_tol=1e-3) and away <= noise


@pytest.mark.parametrize("rows", [4, 64, 100])
def test_row_quarters_are_the_librarys(rows: int) -> None:
    """What `pack_weights` packs, read by the rule that docs/engine.md states, for every row."""
    digits = torch.randint(-1, 2, (rows, 24), generator=torch.Generator().manual_seed(rows))
    packed = bitnet.pack_weights(digits.clone()).numpy()
    for row in range(rows):
        codes = packed[row % (rows // 4)] >> 2 * (row // (rows // 4)) & 3
        assert np.array_equal(codes.astype(int) - 1, digits[row].numpy())


@pytest.mark.parametrize("family", ["BitNet", "Llama"])
def test_digits_are_the_librarys_in_every_form(tmp_path: Path, family: str) -> None:
    """One set of masters: online, autobitlinear and bitlinear give the same digits, and scales to a bf16."""
    read = [
        model_of(open_checkpoint(saved(tmp_path / form, family, "untied", form)))
        for form in ("online", "autobitlinear", "bitlinear")
    ]
    for layers in zip(*(model.layers for model in read), strict=True):
        for part, _, _ in read[0].config.projections():
            online, *packed = (getattr(layer, part) for layer in layers)
            for each in packed:
                assert np.array_equal(unpack_codes(each), unpack_codes(online))
                assert np.allclose(each.scales, online.scales, rtol=2**-8)
