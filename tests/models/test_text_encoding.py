"""Text features against transformers' whole Qwen3 on random weights, and what computing them costs."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from models.z_image.loading import _text_encoder
from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.text_encoder import text_encoding
from tests.support import mini

CPU = torch.device("cpu")
PROMPT = "a red circle above a blue square"
CONFIG = dict(
    vocab_size=606, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, rope_theta=1e6,
)  # fmt: skip


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole(request: pytest.FixtureRequest) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG, tie_word_embeddings=request.param)).eval()
    for weight in model.parameters():  # norms start as ones, which would hide a missing one
        nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture
def tokenizer() -> Any:
    return mini.load()[1].tokenizer


def shards(model: nn.Module, folder: Path, count: int) -> list[Path]:
    model.config.save_pretrained(folder)
    state = {name: x.contiguous().clone() for name, x in model.state_dict().items()}
    paths = [folder / f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        save_file({name: state[name] for name in list(state)[i::count]}, path)
    return paths


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("prompt", [PROMPT, "红", "", "word " * 700])
@torch.no_grad()
def test_features_are_those_of_the_whole_model_padded_and_masked(
    whole: Qwen3ForCausalLM, tokenizer: Any, tmp_path: Path, count: int, prompt: str
) -> None:
    """The official way: pad to 512, mask, take `hidden_states[-2]` where there is text."""
    ours = _text_encoder(tmp_path, shards(whole, tmp_path, count), torch.float32)
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    inputs = tokenizer(
        text, padding="max_length", max_length=512, truncation=True, padding_side="right", return_tensors="pt"
    )
    theirs = whole(**inputs, output_hidden_states=True).hidden_states[-2]
    encoded = text_encoding.encode(ours, tokenizer, prompt, CPU)
    torch.testing.assert_close(
        encoded.features, theirs[inputs["attention_mask"].bool()], rtol=1e-4, atol=1e-5
    )
    assert encoded.dropped == max(0, len(tokenizer(text)["input_ids"]) - 512)
    assert (encoded.dropped > 0) == (len(prompt) > 3000)


def test_what_features_do_not_need_is_not_there(whole: Qwen3ForCausalLM, tmp_path: Path) -> None:
    ours = _text_encoder(tmp_path, shards(whole, tmp_path, 1), torch.float32)
    names = {f"model.{name}" for name in ours.state_dict()}
    left_out = set(whole.state_dict()) - names
    assert names < set(whole.state_dict())
    assert {name.rsplit(".layers.")[0] if "layers.3." not in name else "last" for name in left_out} == {
        "last", "model.norm.weight", "lm_head.weight",
    }  # fmt: skip


def test_only_looked_up_rows_travel_to_the_device(
    whole: Qwen3ForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    encoder = _text_encoder(tmp_path, shards(whole, tmp_path, 1), torch.float32)
    assert encoder.stays_in_ram == ("embed_tokens",)
    encoder.forward = lambda inputs_embeds, use_cache: SimpleNamespace(last_hidden_state=inputs_embeds)
    encoded = text_encoding.encode(encoder, tokenizer, PROMPT, torch.device("meta"))
    ids, _ = text_encoding.tokenize(tokenizer, PROMPT, 512)
    assert encoded.features.device.type == "meta" and encoded.features.shape == (len(ids), 32)
    assert encoder.embed_tokens.weight.device == CPU


def test_no_padding_reaches_the_model(tokenizer: Any) -> None:
    _, pipe = mini.load()
    lengths = []
    hook = pipe.text_encoder.layers[0].register_forward_hook(
        lambda m, args, out: lengths.append(args[0].shape)
    )
    with contextlib.ExitStack() as stack:
        stack.callback(hook.remove)
        text_encoding.encode(pipe.text_encoder, tokenizer, PROMPT, CPU)
    ids, _ = text_encoding.tokenize(tokenizer, PROMPT, 512)
    assert lengths == [(1, len(ids), pipe.text_encoder.config.hidden_size)] and len(ids) < 64


class Recorder:
    """A residency that writes down which parts are used, and in how many uses."""

    def __init__(self) -> None:
        self.used: list[nn.Module] = []

    @contextlib.contextmanager
    def use(self, part: nn.Module) -> Iterator[None]:
        self.used.append(part)
        yield


def fresh(pipe: ZImagePipeline) -> ZImagePipeline:
    """The Mini's parts with an empty memory of prompts."""
    new = ZImagePipeline(
        pipe.transformer, pipe.text_encoder, pipe.vae, pipe.tokenizer, pipe.scheduler_config, pipe.device
    )
    new.residency = Recorder()
    return new


def test_all_prompts_of_a_job_are_one_use_of_the_encoder_and_known_ones_none() -> None:
    pipe = fresh(mini.load("z_image_mini_base")[1])
    how = dict(height=64, width=64, num_inference_steps=1, guidance_scale=2.0)

    def encodings() -> int:
        return sum(part is pipe.text_encoder for part in pipe.residency.used)

    pipe(["a star", "a circle"], ["red", "blue"], **how)
    assert encodings() == 1
    pipe(["a circle"], "blue", **how)
    assert encodings() == 1
    pipe(["a circle", "a square"], "blue", **how)
    assert encodings() == 2
    pipe(prompt_embeds=[torch.zeros(3, 96)], negative_prompt_embeds=[torch.zeros(4, 96)], **how)
    assert encodings() == 2
    assert pipe.residency.used[-1] is pipe.vae


def test_each_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fresh(mini.load("z_image_mini_base")[1])
    texts: list[str] = []
    encode = text_encoding.encode

    def counted(encoder: Any, tokenizer: Any, text: str, *rest: Any) -> Any:
        texts.append(text)
        return encode(encoder, tokenizer, text, *rest)

    monkeypatch.setattr(text_encoding, "encode", counted)
    how = dict(height=64, width=64, num_inference_steps=1, guidance_scale=2.0)
    pipe(["a star", "a star", "a circle"], "a star", num_images_per_prompt=2, **how)
    assert texts == ["a star", "a circle"]
