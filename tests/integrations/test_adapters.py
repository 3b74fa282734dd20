"""Posteriors over adapters of peft: what is written is what peft loads, and nothing is lost silently."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_bdl as lb
from lowrank_bdl.errors import NonFiniteError, ShapeError
from lowrank_bdl.integrations.adapters import save_adapter, save_adapters

peft = pytest.importorskip("peft", reason="peft is in the extra lowrank-bdl[applications]")


def base() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def adapted(**options: Any) -> Any:
    return peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"], **options))


def at(model: nn.Module, theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return lb.FunctionalModel(model, lb.ParameterLayout.from_module(model))(theta, (x, None)).detach()


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["2"]}])
def test_peft_loads_the_network_that_was_written(
    options: dict[str, Any], tmp_path: Path, generator: torch.Generator
) -> None:
    model, x = adapted(**options), torch.randn(5, 3, generator=generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layout = lb.ParameterLayout.from_module(model)
    assert layout.numel == 2 * 3 + 4 * 2 + (10 if options else 0)  # the adapter, and the head that goes with it
    theta = torch.randn(layout.numel, generator=generator)
    save_adapter(model, theta, tmp_path / "a" / "mean")
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "a" / "mean"))
    torch.testing.assert_close(loaded(x), at(model, theta, x), rtol=0, atol=0)
    assert not torch.allclose(loaded(x), base()(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mean"]
    assert json.loads((tmp_path / "a" / "mean" / "adapter_config.json").read_text())["inference_mode"] is True


def test_swag_over_an_adapter_and_its_draws(tmp_path: Path, generator: torch.Generator) -> None:
    model, x = adapted(), torch.randn(5, 3, generator=generator)
    swag = lb.SWAG(model, rank=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        swag.update_parameters(model)
    posterior = swag.posterior()
    assert posterior.mean.shape == (14,)
    folders = save_adapters(model, posterior, tmp_path, 3, generator=torch.Generator().manual_seed(2))
    assert [folder.name for folder in folders] == ["mean", "draw-0", "draw-1", "draw-2"]
    draws = posterior.sample(3, generator=torch.Generator().manual_seed(2))
    for folder, theta in zip(folders, [posterior.mean, *draws], strict=True):
        loaded = peft.PeftModel.from_pretrained(base(), str(folder))
        torch.testing.assert_close(loaded(x), at(model, theta, x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="num_samples must be at least 0; got -1"):
        save_adapters(model, posterior, tmp_path / "more", -1)


def test_an_adapter_with_a_name_of_its_own(tmp_path: Path, generator: torch.Generator) -> None:
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=1, target_modules=["2"]))
    model.set_adapter("second")
    theta = torch.randn(lb.ParameterLayout.from_module(model).numel, generator=generator)
    x = torch.randn(5, 3, generator=generator)
    save_adapter(model, theta, tmp_path / "second", adapter_name="second")
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "second"))
    torch.testing.assert_close(loaded(x), at(model, theta, x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"are no part of the adapter 'default' and would be lost: .*second.* and 1"):
        save_adapter(model, theta, tmp_path / "first")


def test_refuses_what_would_be_lost_or_overwritten(tmp_path: Path) -> None:
    model = adapted()
    theta = torch.zeros(14)
    with pytest.raises(TypeError, match="model must be a peft model, as peft.get_peft_model gives it; got Sequential"):
        save_adapter(base(), theta, tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\]; got 'other'"):
        save_adapter(model, theta, tmp_path / "x", adapter_name="other")
    with pytest.raises(ShapeError, match=r"theta must have shape \(14,\); got \(13,\)"):
        save_adapter(model, theta[1:], tmp_path / "x")
    with pytest.raises(NonFiniteError, match="theta must be finite"):
        save_adapter(model, theta / 0, tmp_path / "x")
    everything = lb.ParameterLayout.from_module(model, trainable_only=False)
    with pytest.raises(ValueError, match=r"would be lost: .*base_layer\.weight and 3 more"):
        save_adapter(model, torch.zeros(everything.numel), tmp_path / "x", layout=everything)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="is there already; an adapter is written to a new or an empty folder"):
        save_adapter(model, theta, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
