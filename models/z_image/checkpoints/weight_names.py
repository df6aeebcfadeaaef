"""How the files of the Z-Image family name their tensors, as tables for shared/weights/formats.py.

The models' own names are those of diffusers' checkpoints. The other spellings: ComfyUI's single files (which
are the original release's), Nunchaku's, TwinFlow's second time embedder, the original Flux VAE.
"""

from shared.weights.formats import Names

#: what a file is when it is not what it was chosen for, the narrower first
_PARTS = (
    (r"(^|\.)control_(layers|noise_refiner|all_x_embedder)\.", "a control network"),
    (r"(^|\.)(cap_pad_token|x_pad_token)$", "a Z-Image transformer"),
    (r"(^|\.)cap_embedder\.0\.", "another transformer of the Lumina kind"),
    (r"(^|\.)decoder\.conv_in\.", "a VAE"),
    (r"(^|\.)embed_tokens\.", "a text encoder"),
    (r"(^|\.)(double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks)\.\d+\.",
     "the transformer of another model"),
    (r"(^|\.)(input_blocks|down_blocks)\.\d+\.", "the U-Net of another model"),
)  # fmt: skip

#: other spellings inside of a block
_BLOCK_RENAMES = (
    (r"\.attention\.out\.", ".attention.to_out.0."),
    (r"\.attention\.q_norm\.", ".attention.norm_q."),
    (r"\.attention\.k_norm\.", ".attention.norm_k."),
    (r"\.feed_forward\.net\.2\.", ".feed_forward.w2."),
)
_BLOCK_FUSED = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.to_qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),  # value rows, then gate rows
}
_BLOCK_LINEARS = r"attention\.to_(q|k|v|out\.0)|feed_forward\.w[123]"

TRANSFORMER = Names(
    family="a Z-Image transformer",
    folder="transformer",
    known=("cap_pad_token", "x_pad_token"),
    renames=(
        (r"(^|\.)extended_weights\.", r"\1"),
        (r"^x_embedder\.", "all_x_embedder.2-1."),
        (r"^final_layer\.", "all_final_layer.2-1."),
        *_BLOCK_RENAMES,
    ),
    fused=_BLOCK_FUSED,
    dropped=r"^norm_final\.weight$",  # the final LayerNorm has no affine weights
    mistaken=_PARTS,
    plain=r"^(t_embedder(_2)?|cap_embedder|all_x_embedder|all_final_layer)\.",
    quantizable=rf"\.({_BLOCK_LINEARS})$",
)

CONTROL = Names(
    family="a Z-Image control network",
    known=("control_all_x_embedder.2-1.weight",),
    renames=_BLOCK_RENAMES,
    fused=_BLOCK_FUSED,
    mistaken=_PARTS[1:],
    plain=r"^control_all_x_embedder\.",
    quantizable=rf"\.({_BLOCK_LINEARS}|before_proj|after_proj)$",
)

TEXT_ENCODER = Names(
    family="a Qwen3 text encoder",
    folder="text_encoder",
    known=("layers.0.self_attn.q_norm.weight",),
    dropped=r"rotary_emb\.inv_freq$",
    mistaken=_PARTS,
    quantizable=r"\.(self_attn|mlp)\.\w+_proj$",
    as_stored=r"^embed_tokens\.weight$",
)

_FLUX_RESNETS = tuple(
    (rf"^decoder\.up\.{i}\.", f"decoder.up_blocks.{3 - i}.") for i in range(4)
)  # the original counts the decoder's levels from the image inwards

VAE = Names(
    family="a Z-Image VAE",
    folder="vae",
    known=("decoder.conv_in.weight",),
    renames=(
        *_FLUX_RESNETS,
        (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
        (r"_blocks\.(\d+)\.block\.(\d+)\.", r"_blocks.\1.resnets.\2."),
        (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.attentions\.0\.norm\.", ".attentions.0.group_norm."),
        (r"\.attentions\.0\.(q|k|v)\.", r".attentions.0.to_\1."),
        (r"\.attentions\.0\.proj_out\.", ".attentions.0.to_out.0."),
        (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    ),
    mistaken=_PARTS,
)
