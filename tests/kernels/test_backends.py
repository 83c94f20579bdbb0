"""Which backend is chosen, what each refuses by name, and what the packages of others are called with."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from llm2vec_kernels import devices
from llm2vec_kernels.attention import (
    AttentionNeeds,
    AttentionOptions,
    attention,
    backends,
    choose_attention_backend,
    reference,
    tile_sizes,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
HALF = torch.bfloat16
CAUSAL = AttentionOptions(1.0, causal=True)
DROPOUT = AttentionOptions(1.0, dropout_p=0.3)


@pytest.fixture
def _all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a data-centre GPU and every package."""
    monkeypatch.setattr(backends, "INSTALLED", frozenset(backends.PACKAGES))
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    monkeypatch.delenv("LLM2VEC_TRITON", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "card_of", lambda device: tile_sizes.HOPPER)


@pytest.mark.usefixtures("_all_installed")
@pytest.mark.parametrize(
    ("needs", "name", "reason"),
    [
        (AttentionNeeds(CPU), "torch", "auto: the device is cpu"),
        (
            AttentionNeeds(CUDA, HALF, 128, options=AttentionOptions(1.0, softcap=50.0, dropout_p=0.3)),
            "triton",
            "non-causal attention on CUDA",
        ),
        (
            AttentionNeeds(CUDA, HALF, 128, options=CAUSAL),
            "torch",
            "not triton, causal attention is not supported",
        ),
        (
            AttentionNeeds(CUDA, torch.float64, 64),
            "torch",
            "not triton, dtype torch.float64 is not supported",
        ),
        (AttentionNeeds(CUDA, HALF, 512), "torch", "not triton, head dim 512 exceeds 256"),
    ],
)
def test_auto_says_why(needs: AttentionNeeds, name: str, reason: str) -> None:
    chosen = choose_attention_backend("auto", needs)
    assert chosen.name == name
    assert reason in chosen.reason


@pytest.mark.usefixtures("_all_installed")
@pytest.mark.parametrize(
    ("name", "needs", "message"),
    [
        ("triton", {"options": CAUSAL}, "causal attention is not supported: use attention `torch`"),
        ("flash_attn", {"options": CAUSAL}, "causal attention is not supported"),
        ("varlen", {"options": CAUSAL}, "causal attention is not supported"),
        ("triton", {"dtype": torch.float64}, "dtype torch.float64 is not supported"),
        ("flash_attn", {"dtype": torch.float32}, "only float16, bfloat16"),
        ("varlen", {"dtype": torch.float32}, "only float16, bfloat16"),
        ("flash_attn", {"head_dim": 60}, "head dim 60 is not a multiple of 8"),
        ("flash_attn", {"options": DROPOUT}, "FlashAttention-3 has no dropout"),
        ("varlen", {"options": AttentionOptions(1.0, softcap=50.0)}, "no softcap: use attention `triton`"),
        ("varlen", {"options": DROPOUT}, "no dropout: use attention `triton`"),
        ("flash_attn", {"device": CPU}, "needs a CUDA device, not cpu"),
        ("varlen", {"device": CPU}, "needs a CUDA device, not cpu"),
    ],
)
def test_refusals_name_the_mend(name: str, needs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"attention backend '{name}': .*{message}"):
        choose_attention_backend(name, AttentionNeeds(**{"device": CUDA, "dtype": HALF, **needs}))


def test_what_is_not_installed_or_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "INSTALLED", frozenset())
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    for name, package in (("triton", "triton"), ("flash_attn", "flash_attn")):
        with pytest.raises(ValueError, match=f"package {package} is not installed"):
            choose_attention_backend(name, AttentionNeeds(CUDA, HALF))
    monkeypatch.setattr(backends, "INSTALLED", frozenset(["flash_attn"]))
    both = AttentionOptions(1.0, softcap=5.0, dropout_p=0.1)
    with pytest.raises(ValueError, match="FlashAttention-2 has no dropout beside a softcap"):
        choose_attention_backend("flash_attn", AttentionNeeds(CUDA, HALF, options=both))


@pytest.mark.usefixtures("_all_installed")
def test_one_switch_turns_triton_off_for_attention_too(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = AttentionNeeds(CUDA, HALF, 128)
    assert choose_attention_backend("auto", needs).name == "triton"
    monkeypatch.setenv("LLM2VEC_TRITON", "0")
    devices._refusal.cache_clear()
    chosen = choose_attention_backend("auto", needs)
    assert chosen.name == "torch"
    assert "auto: not triton, Triton is turned off by LLM2VEC_TRITON=0" in chosen.reason
    for device in (CUDA, CPU):
        with pytest.raises(ValueError, match="'triton': .*LLM2VEC_TRITON=0.*use attention `torch`"):
            choose_attention_backend("triton", AttentionNeeds(device, HALF))
    assert choose_attention_backend("flash_attn", needs).name == "flash_attn"


@pytest.mark.usefixtures("_all_installed")
def test_an_old_card_is_refused_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    chosen = choose_attention_backend("auto", AttentionNeeds(CUDA, HALF))
    assert chosen.name == "torch"
    assert "auto: not triton, cuda:0 has compute capability 7.0" in chosen.reason


@pytest.mark.usefixtures("_all_installed")
def test_a_card_with_little_shared_memory_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD's, which have no figure beyond the common one."""

    class Properties:
        name = "Instinct MI300X"
        shared_memory_per_block = 65_536

    monkeypatch.setattr(backends, "card_of", tile_sizes.card_of)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    tile_sizes.card_of.cache_clear()
    chosen = choose_attention_backend("auto", AttentionNeeds(CUDA, HALF))
    assert chosen.name == "torch"
    assert "Instinct MI300X gives a program 65536 bytes" in chosen.reason
    tile_sizes.card_of.cache_clear()


def fake_package(name: str, accepts: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that computes by the reference, and takes no argument that the real one lacks."""

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        **options: Any,
    ) -> Any:
        assert set(options) <= accepts
        assert (max_q, max_k) == (4, 4)
        assert torch.equal(cu_q, cu_k)
        left, right = options["window_size"]
        assert left == right
        out = reference.attention(
            q,
            k,
            v,
            cu_q,
            AttentionOptions(
                options["softmax_scale"],
                window=None if left == -1 else left,
                softcap=options["softcap"] or None,
            ),
        )
        return (out, None) if name == "flash_attn_interface" else out

    module = ModuleType(name)
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(backends, "INSTALLED", frozenset([name]))
    monkeypatch.setattr(backends, "_no_cuda", lambda needs: None)


@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (2, None), (None, 3.0)])
def test_flash_attn_is_called_as_its_releases_want_it(
    package: str, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepts = {"softmax_scale", "window_size", "softcap", "deterministic"}
    fake_package(package, accepts | ({"dropout_p"} if package == "flash_attn" else set()), monkeypatch)
    q, k, v = torch.randn(3, 7, 2, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 3, 7]).int()
    options = AttentionOptions(0.5, window, softcap)
    ours = attention(q, k, v, cu_seqlens, 4, options=options, backend="flash_attn")
    assert torch.equal(ours, reference.attention(q, k, v, cu_seqlens, options))
