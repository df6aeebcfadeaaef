"""Attention backends: which one is chosen, what the user is told, and how the packages are called."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from shared.errors import UserError
from shared.gpu import attention
from shared.settings.table import ATTENTION_PACKAGES, SETTINGS
from tests.support import mini
from tests.support.transformers import pair

ADA, AMPERE, HOPPER, TURING = (8, 9), (8, 6), (9, 0), (7, 5)
BASE_RULE = {"<89": "sdpa"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    packages = set(ATTENTION_PACKAGES.values())
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name in packages or None)
    return packages


@pytest.mark.parametrize(
    ("requested", "rule", "capability", "name", "said"),
    [
        (None, None, AMPERE, "sdpa", None),
        ("auto", BASE_RULE, ADA, "sdpa", None),
        ("sage", None, AMPERE, "sage", None),
        ("sage", BASE_RULE, ADA, "sage", None),
        (
            "sage",
            BASE_RULE,
            AMPERE,
            "sdpa",
            "needs the attention backend sdpa on this card; sage was not used",
        ),
        ("auto", BASE_RULE, AMPERE, "sdpa", None),
        ("sdpa", BASE_RULE, AMPERE, "sdpa", None),
        ("auto", "flash", AMPERE, "flash", None),
        ("_flash_3", None, HOPPER, "_flash_3", None),
        ("_flash_3", None, ADA, "sdpa", "does not run on cards of compute capability 8.9"),
        ("sage", None, TURING, "sdpa", "does not run on cards of compute capability 7.5"),
        ("flash", {">=80&<90": "sage"}, AMPERE, "sage", "sage on this card; flash was not used"),
        ("flash", {"<80+>=90": "sdpa"}, AMPERE, "flash", None),
        ("flash", {"<80+=90": "sdpa"}, HOPPER, "sdpa", "flash was not used"),
    ],
)
def test_choice(installed: set[str], requested, rule, capability, name: str, said: str | None) -> None:
    chosen, note = attention.choose(requested, rule, capability)
    assert chosen == name
    assert (note is None) if said is None else said in note


def test_a_missing_package_is_named_with_what_to_do(installed: set[str]) -> None:
    installed.discard("sageattention")
    name, note = attention.choose("sage", None, ADA)
    assert name == "sdpa"
    assert note == (
        "Attention backend sage was replaced by sdpa: its package sageattention is missing; install it with: "
        "pip install sageattention."
    )


def test_a_job_overrides_the_program(installed: set[str]) -> None:
    assert attention.choose("sdpa", None, ADA, otherwise="flash") == ("sdpa", None)
    assert attention.choose("", None, ADA, otherwise="flash") == ("flash", None)


@pytest.mark.parametrize(
    ("rule", "said"), [("fast", "'fast' does not exist"), ({"<8x": "sdpa"}, '"<8x"; expected a comparison')]
)
def test_a_wrong_rule_is_named(rule, said: str) -> None:
    with pytest.raises(UserError, match=said):
        attention.choose(None, rule, ADA)


def test_a_wrong_name_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match="choose one of: sdpa, flash, _flash_3, sage"):
        attention.choose("fastest")


CALLS = {
    "flash": ("flash_attn", "flash_attn_func", {}),
    "_flash_3": ("flash_attn_interface", "flash_attn_func", {}),
    "sage": ("sageattention", "sageattn", {"tensor_layout": "NHD"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_package_gets_tokens_before_heads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package, function, expected = CALLS[name]

    def attend(q, k, v, **arguments):
        assert arguments == expected
        weights = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v.float()).to(q.dtype)
        return (out, None) if name == "_flash_3" else out

    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(**{function: attend}))
    q, k, v = torch.randn(3, 2, 7, 3, 16, generator=torch.Generator().manual_seed(0))
    backend = attention.BACKENDS[name].attend
    half = [x.bfloat16() for x in (q, k, v)]
    assert backend(*half).shape == (2, 7, 48)
    torch.testing.assert_close(backend(*half).float(), attention.sdpa(q, k, v), atol=0.03, rtol=0.03)
    monkeypatch.setitem(sys.modules, package, None)
    assert torch.equal(backend(q, k, v), attention.sdpa(q, k, v))  # none of them computes in float32


def test_sdpa_is_softmax_attention() -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    for head in range(2):
        weights = F.softmax(q[0, :, head] @ k[0, :, head].T / 8**0.5, dim=-1)
        torch.testing.assert_close(
            attention.sdpa(q, k, v)[0].unflatten(-1, (2, 8))[:, head], weights @ v[0, :, head]
        )


def test_the_transformer_falls_back_and_says_so() -> None:
    _, model = pair("odd")
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    assert "runs on CUDA cards only" in (model.set_attention_backend("flash") or "")
    assert model.layers[0].attention.attend is attention.sdpa
    assert model.set_attention_backend("sdpa") is None


def test_a_job_is_told_and_makes_its_picture() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    processor, _ = mini.load()
    result = processor.generate(
        dict(prompt="a red circle", resolution="64x64", num_inference_steps=1, override_attention="sage"),
        seeds=[1],
        on_phase=lambda phase: None,
        on_step=lambda *step: None,
        interrupt=lambda: False,
    )
    assert len(result.images) == 1
    assert result.notes[0].startswith("Attention backend sage was replaced by sdpa: it runs on CUDA cards")


def test_the_setting_offers_every_backend_and_acts_where_one_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = SETTINGS["override_attention"]
    assert set(setting.choices) == {"", *attention.BACKENDS}
    from models.z_image import z_image_handler as handler

    for present in (True, False):
        monkeypatch.setattr(
            handler.importlib.util, "find_spec", lambda name, present=present: present or None
        )
        assert handler.family_handler.query_model_def("z_image", {})[setting.needs] is present
