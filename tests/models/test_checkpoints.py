"""Checkpoints: lazy, checked before they are mapped, and never wrong about what they are."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gnomon.errors import CheckpointError, GnomonError, ModelNotFound, UnsupportedModel, UsageError
from gnomon.models.gguf_file import GgufFile
from gnomon.models.reference import Reference, open_checkpoint
from helpers.tiny import tiny_config, tiny_tensors, write_tiny_model


def test_a_directory_gives_exactly_the_tensors_of_its_file(tiny_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_dir)
    expected = load_file(tiny_dir / "model.safetensors")
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint[name], tensor)
        assert checkpoint.info(name).shape == tuple(tensor.shape)


def test_sharded_and_single_files_have_the_same_identity(tmp_path: Path) -> None:
    single = open_checkpoint(write_tiny_model(tmp_path / "a"))
    sharded = open_checkpoint(write_tiny_model(tmp_path / "b", shards=3))
    other = open_checkpoint(write_tiny_model(tmp_path / "c", seed=1))
    assert single.identity == sharded.identity != other.identity
    assert single.identity == open_checkpoint(tmp_path / "a").identity


def test_bin_weights_equal_safetensors_and_a_hostile_pickle_never_runs(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    expected = open_checkpoint(folder).identity
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).identity == expected

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Hostile()}))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert not (tmp_path / "owned").exists()


def test_a_truncated_safetensors_file_is_refused_with_both_sizes(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(folder)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../evil.safetensors"}}))
    with pytest.raises(CheckpointError, match="leads out"):
        open_checkpoint(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002"):
        open_checkpoint(folder)


def lora(folder: Path, base: Path, **config: object) -> Path:
    folder.mkdir()
    target = "model.layers.0.self_attn.q_proj"
    torch.manual_seed(0)
    save_file(
        {
            f"base_model.model.{target}.lora_A.weight": torch.randn(2, 48),
            f"base_model.model.{target}.lora_B.weight": torch.randn(64, 2),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return folder


def test_a_lora_adapter_adds_its_scaled_product_and_changes_the_identity(tmp_path: Path, tiny_dir: Path) -> None:
    adapter = lora(tmp_path / "lora", tiny_dir)
    base, laid = open_checkpoint(tiny_dir), open_checkpoint(f"{tiny_dir}+{adapter}")
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj"
    delta = (2.0 * parts[f"{key}.lora_B.weight"]).double() @ parts[f"{key}.lora_A.weight"].double()
    assert torch.equal(laid[name], base[name] + delta.float())  # one rounding: the same bits on every machine
    assert torch.equal(laid["model.norm.weight"], base["model.norm.weight"])
    assert laid.identity != base.identity


@pytest.mark.parametrize(
    ("config", "says"), [({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")]
)
def test_an_adapter_of_another_kind_is_refused_by_name(
    config: dict[str, object], says: str, tmp_path: Path, tiny_dir: Path
) -> None:
    adapter = lora(tmp_path / "lora", tiny_dir, **config)
    with pytest.raises(UnsupportedModel, match=says):
        open_checkpoint(f"{tiny_dir}+{adapter}")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("smollm2-135m-instuct", ModelNotFound, "smollm2-135m-instruct"),
        ("./nowhere", ModelNotFound, "No file or directory"),
        ("hf:broken", UsageError, "hf:org/name"),
        ("pip:pkg#file", UsageError, "pip:package==version#file"),
        ("", UsageError, "empty"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_would(text: str, error: type[GnomonError], says: str) -> None:
    with pytest.raises(error, match=says):
        open_checkpoint(text, fetch=False)


def test_references_parse_into_their_parts() -> None:
    parsed = Reference.parse("hf:org/name@main+./lora-a+./lora-b")
    assert (parsed.kind, parsed.location, parsed.revision) == ("hub", "org/name", "main")
    assert parsed.adapters == ("./lora-a", "./lora-b")
    assert Reference.parse("pip:a-b==1.0#dir/file.gguf").kind == "pip"


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, object]) -> Path:
    """A small GGUF v3 file of float32 tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def entry(key: str, value: object) -> bytes:
        if isinstance(value, str):
            return text(key) + struct.pack("<I", 8) + text(value)
        if isinstance(value, float):
            return text(key) + struct.pack("<If", 6, value)
        return text(key) + struct.pack("<II", 4, value)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        shape = list(tensor.shape)[::-1]
        head += text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in shape)
        head += struct.pack("<IQ", 0, len(body))
        body += tensor.contiguous().numpy().tobytes()
        body += b"\0" * (-len(body) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def tiny_gguf(path: Path) -> Path:
    """The tiny llama, its query and key rows in llama.cpp's order."""
    config = tiny_config("llama")
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    tensors = {}
    for name, tensor in tiny_tensors(config).items():
        renamed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
            name
        )
        if name == "lm_head.weight":
            renamed = "output.weight"
        if renamed is None:
            _, _, layer, *part, kind = name.split(".")
            renamed = f"blk.{layer}.{names['.'.join(part)]}.{kind}"
            heads = {"attn_q": 4, "attn_k": 2}.get(renamed.split(".")[2])
            if heads:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        tensors[renamed] = tensor
    metadata: dict[str, object] = {
        "general.architecture": "llama", "llama.block_count": 4, "llama.context_length": 512,
        "llama.embedding_length": 48, "llama.feed_forward_length": 80, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 10000.0,
    }  # fmt: skip
    return write_gguf(path, tensors, metadata)


def test_a_gguf_file_gives_hugging_faces_names_rows_and_config(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_gguf(tmp_path / "tiny.gguf"))
    expected = tiny_tensors(tiny_config("llama"))
    assert set(checkpoint) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint[name], tensor), name
    config = tiny_config("llama")
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        assert checkpoint.config[key] == config[key], key


def test_a_gguf_file_cut_anywhere_is_refused_cleanly(tmp_path: Path) -> None:
    whole = tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 1400, 37), len(whole) // 2, len(whole) - 40]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_checkpoint(cut)


def test_a_gguf_of_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "x.gguf", {}, {"general.architecture": "frobnicate"})
    with pytest.raises(UnsupportedModel, match="frobnicate"):
        open_checkpoint(file)


@pytest.mark.model
def test_the_real_file_reads_as_the_gguf_package_reads_it(smollm2) -> None:  # type: ignore[no-untyped-def]
    import gguf

    path = smollm2.checkpoint.path
    file = GgufFile(path)
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} == set(file.tensors)
    for tensor in reader.tensors[:12]:
        assert file.tensors[tensor.name].begin == tensor.data_offset
        assert tensor.tensor_type.name == file.tensors[tensor.name].type_name
    assert file.metadata["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    name = "model.layers.3.mlp.up_proj.weight"
    raw = next(t for t in reader.tensors if t.name == "blk.3.ffn_up.weight")
    assert torch.equal(smollm2.checkpoint[name], torch.from_numpy(gguf.quants.dequantize(raw.data, raw.tensor_type)))


def test_removing_a_config_is_an_error_that_names_it(tmp_path: Path, tiny_dir: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_dir, folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)
