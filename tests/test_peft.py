"""LoRA adapters of peft on a frozen compressed model: trained, saved, loaded, never merged."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

peft = pytest.importorskip("peft", minversion="0.20")
transformers = pytest.importorskip("transformers", minversion="5")

from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402

from marlin import api, nn  # noqa: E402
from marlin.errors import UnsupportedError  # noqa: E402
from marlin.integrations.peft import SparseLoraLinear, register  # noqa: E402

IDS = torch.arange(24).view(2, 12) * 7 % 96
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def tiny_model(bias: bool) -> Any:
    """Two blocks, compressed but for one gate_proj; k_proj and v_proj dense INT4, the others 2:4."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96, attention_bias=bias)).eval()
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name not in ("lm_head", "model.layers.1.mlp.gate_proj"):
            torch.nn.init.normal_(module.weight, std=0.1)
            kind = "w4a16_dense" if name.endswith(("k_proj", "v_proj")) else "w4a16_sp24"
            weights[name] = nn.SparseLinear.from_dense(module, group_size=32, kind=kind).to_weight()
    nn.replace_linears(model, weights)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["no-bias", "bias"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.save_pretrained(tiny_model(request.param), tmp_path_factory.mktemp("lora") / "model")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"target_modules": TARGETS, "r": 4, "task_type": "CAUSAL_LM"} | options))


def with_adapter(directory: Path, **options: Any) -> Any:
    """The model with an adapter that changes what it says."""
    model = get_peft_model(load(directory), config(**options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def sparse_adapters(model: Any) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, SparseLoraLinear)]
    return [name.removeprefix("base_model.model.") for name in names]


def test_adapters_sit_on_compressed_layers_and_begin_as_nothing(directory: Path) -> None:
    base = load(directory)
    before = logits(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of layers that it does not know
        model = get_peft_model(base, config())
    blocks = [[f"model.layers.{i}.self_attn.{name}" for name in ("q_proj", "v_proj")] for i in range(2)]
    mlps = [["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"], ["model.layers.1.mlp.down_proj"]]
    assert sparse_adapters(model) == [*blocks[0], *mlps[0], *blocks[1], *mlps[1]]
    assert isinstance(model.base_model.model.model.layers[1].mlp.gate_proj, peft.tuners.lora.Linear)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step_lowers_the_loss_and_leaves_the_base_alone(directory: Path, dtype: torch.dtype) -> None:
    base = load(directory, dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, config()).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    after = {name.replace(".base_layer", ""): t for name, t in base.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_adapter_gradients_are_those_on_the_dequantized_model(directory: Path) -> None:
    model = with_adapter(directory)
    dense = load(directory)
    dense.dequantize()
    twin = get_peft_model(dense, config())
    twin.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" in n}, strict=False)
    for each in (model, twin):
        each(input_ids=IDS, labels=IDS).loss.backward()
    wanted = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert got.keys() == wanted.keys() and len(got) == 16
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-6)


def test_adapter_saves_and_loads(directory: Path, tmp_path: Path) -> None:
    model = with_adapter(directory)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    assert not torch.allclose(wanted, logits(load(directory)), atol=1e-3)
    assert torch.equal(logits(PeftModel.from_pretrained(load(directory), tmp_path)), wanted)
    by_transformers = load(directory)
    by_transformers.load_adapter(str(tmp_path))
    assert torch.equal(logits(by_transformers), wanted)


def test_adapter_can_be_disabled_doubled_and_unloaded(directory: Path) -> None:
    base = logits(load(directory))
    model = with_adapter(directory)
    first = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.add_adapter("second", config(r=2, use_rslora=True, init_lora_weights="gaussian"))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base)
    plain = model.unload()
    assert torch.equal(logits(plain), base) and len(list(nn.sparse_linears(plain))) == 13


def test_merge_is_refused_and_changes_nothing(directory: Path) -> None:
    model = with_adapter(directory, target_modules=["q_proj"])
    wanted = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError) as caught:
            merge()
        assert str(caught.value) == (
            "merge LoRA: the base layer must be dense; got SparseLinear of kind w4a16_sp24. Keep the adapter beside "
            "the model, or load the model, call dequantize() and merge into that."
        )
    assert torch.equal(logits(model), wanted)


def test_refused_merge_can_be_taken_back_from_dense_layers(directory: Path) -> None:
    model = with_adapter(directory, target_modules=["layers.1.mlp.gate_proj", "layers.1.mlp.down_proj"])
    wanted = logits(model)
    mlp = model.base_model.model.model.layers[1].mlp
    with pytest.raises(UnsupportedError, match="the base layer must be dense"):
        model.merge_adapter()
    assert mlp.gate_proj.merged and not mlp.down_proj.merged
    model.unmerge_adapter()
    assert not mlp.gate_proj.merged
    torch.testing.assert_close(logits(model), wanted)


def test_adapter_merges_into_the_dequantized_model(directory: Path, tmp_path: Path) -> None:
    model = with_adapter(directory)
    model.save_pretrained(tmp_path)
    dense = load(directory)
    dense.dequantize()
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"use_dora": True},
            "LoRA on SparseLinear: adapters must be plain LoRA; got Invalid or unsupported variant combination: "
            "('use_dora',). Turn DoRA and other variants off, or leave compressed layers out of target_modules.",
        ),
        (
            {"init_lora_weights": "pissa"},
            "LoRA on SparseLinear: init_lora_weights must be one of (True, False, 'gaussian', 'eva'); got 'pissa'. "
            "Pass True, or leave compressed layers out of target_modules.",
        ),
    ],
    ids=["dora", "pissa"],
)
def test_what_needs_the_dense_weight_is_refused(directory: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        get_peft_model(load(directory), config(**options))
    assert str(caught.value) == text


def test_adapter_begins_from_the_inputs_by_eva(directory: Path) -> None:
    model = get_peft_model(load(directory), config(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)))
    peft.initialize_lora_eva_weights(model, [{"input_ids": row[None]} for row in IDS] * 2, show_progress_bar=False)
    for name, module in model.named_modules():
        if isinstance(module, SparseLoraLinear):
            down = module.lora_A["default"].weight.detach()
            torch.testing.assert_close(down @ down.T, torch.eye(down.shape[0]), rtol=0, atol=1e-4, msg=name)


def test_older_peft_is_refused(directory: Path) -> None:
    """Before 0.20, custom layers were made without the configuration."""
    with pytest.raises(UnsupportedError) as caught:
        SparseLoraLinear(next(nn.sparse_linears(load(directory)))[1], "default", r=4, lora_alpha=4)
    text = "LoRA on SparseLinear: peft must be 0.20 or newer; got an older one. Update it: pip install -U peft."
    assert str(caught.value) == text


def test_model_with_adapters_is_not_saved_as_a_model(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        api.save_pretrained(with_adapter(directory), tmp_path / "out")
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer"
    assert str(caught.value) == (
        f"save_pretrained: model must have no adapters; got {name}. "
        "Save the adapters with model.save_pretrained, and the model without them (PeftModel.unload)."
    )
    assert not list(tmp_path.iterdir())


def test_trainer_trains_adapters_under_checkpointing(directory: Path, tmp_path: Path) -> None:
    """Its check of quantized models lets adapters pass and nothing else."""
    options = {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    arguments = TrainingArguments(str(tmp_path), **options, logging_steps=1, save_strategy="no", bf16=True)
    rows = [{"input_ids": row, "labels": row} for row in IDS] * 8
    model = get_peft_model(load(directory, torch.bfloat16), config())
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
        Trainer(load(directory), arguments, train_dataset=rows)


def test_generate_with_an_adapter(directory: Path) -> None:
    model = with_adapter(directory)
    ids, options = IDS[:1], {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **options)
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_compiled_model_with_an_adapter_is_one_graph(directory: Path) -> None:
    model = with_adapter(directory).base_model.model
    torch._dynamo.reset()
    compiled = torch.compile(model.model.layers[0].mlp, backend="aot_eager", fullgraph=True)
    act = torch.randn(2, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(act), model.model.layers[0].mlp(act))


def test_registration_twice_changes_nothing() -> None:
    before = LoraConfig.__post_init__
    register()
    assert LoraConfig.__post_init__ is before
    assert config()._custom_modules == {nn.SparseLinear: SparseLoraLinear}
    assert "custom_modules" not in str(config().to_dict())


@pytest.mark.parametrize("code", ["import marlin; import peft", "import peft; import marlin"], ids=["before", "after"])
def test_import_of_marlin_registers_with_peft_in_either_order(code: str) -> None:
    source = str(Path(nn.__file__).parents[1])
    probe = f"import sys; sys.path.insert(0, {source!r}); {code}; c = peft.LoraConfig(); print(len(c._custom_modules))"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout.strip()) == (0, "1"), result.stderr
