"""Batches of Hugging Face's tokenizers, labels and all, into everything that takes data."""

import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import lowrank_bdl as lb
from lowrank_bdl.errors import ShapeError

transformers = pytest.importorskip("transformers", reason="needs the applications extra")

SIZES = {"vocab_size": 20, "num_labels": 3}


def bert(kind):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        **SIZES,
    )
    return getattr(transformers, kind)(config).double().eval()


def encoded():
    torch.manual_seed(1)
    tokens, mask, labels = torch.randint(20, (4, 5)), torch.ones(4, 5, dtype=torch.long), torch.randint(3, (4,))
    mask[2, 3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("wrap", [dict, transformers.BatchEncoding], ids=["dict", "BatchEncoding"])
def test_sequence_classification_against_dense_oracles(wrap):
    net, batch = bert("BertForSequenceClassification"), wrap(encoded())
    layout = lb.ParameterLayout.from_module(net, include=["classifier.*"])
    theta = layout.flatten(net)

    def outputs(flat):
        return functional_call(net, layout.unflatten(flat), (batch["input_ids"], batch["attention_mask"])).logits

    hessian = torch.autograd.functional.hessian(lambda flat: cross_entropy(outputs(flat), batch["labels"]), theta)
    for operator in (lb.HessianLinearOperator, lb.GGNLinearOperator):  # the same: the last layer is linear
        found = operator(net, cross_entropy, [batch], layout=layout).to_dense()
        torch.testing.assert_close(found, hessian, rtol=1e-8, atol=1e-10)
    found = lb.FisherLinearOperator(net, "categorical", batch, layout=layout).to_dense()
    torch.testing.assert_close(found, hessian, rtol=1e-8, atol=1e-10)
    own = lb.DiagonalLaplace(net, labels="expected", include=["classifier.*"]).fit([batch], progress=False)
    torch.testing.assert_close(own.fisher_diagonal, 4 * hessian.diagonal(), rtol=1e-8, atol=1e-10)
    noise = lb.GradientCovariance(net, cross_entropy, include=["classifier.*"])
    noise.update(batch)
    slope = torch.autograd.functional.jacobian(lambda flat: cross_entropy(outputs(flat), batch["labels"]), theta)
    torch.testing.assert_close(noise.mean, slope, rtol=1e-8, atol=1e-10)
    predicted = lb.predict(net, torch.stack([theta, 2 * theta]), batch, layout=layout, progress=False)
    probabilities = (outputs(theta).softmax(1) + outputs(2 * theta).softmax(1)) / 2
    torch.testing.assert_close(predicted.mean, probabilities.detach())
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_label_for_each_token():
    net, batch = bert("BertForTokenClassification"), encoded() | {"labels": torch.randint(3, (4, 5))}
    theta = lb.ParameterLayout.from_module(net).flatten(net)
    found = lb.predict(net, theta, batch, progress=False)
    assert found.mean.shape == (4, 5, 3)
    assert found.nll == pytest.approx(net(**batch).loss.item(), rel=1e-10)
    losses = lb.evaluate_points(net, theta[None], batch, cross_entropy, progress=False)
    assert losses.loss.item() == pytest.approx(found.nll, rel=1e-10)


def test_models_that_return_their_own_loss():
    net, batch = bert("BertForTokenClassification"), encoded() | {"labels": torch.randint(3, (4, 5))}
    own = {"call_fn": lambda model, batch: model(**batch).loss, "include": ["classifier.*"]}
    found = lb.HessianLinearOperator(net, lambda loss, labels: loss, batch, **own).to_dense()
    expected = lb.HessianLinearOperator(net, cross_entropy, batch, include=["classifier.*"]).to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_shifted_labels_of_a_language_model_are_not_compared_with_the_wrong_tokens():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    net = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.randint(20, (3, 6))
    batch, theta = {"input_ids": tokens, "labels": tokens}, lb.ParameterLayout.from_module(net).flatten(net)
    with pytest.raises(ShapeError, match="GPT2LMHeadModel shifts labels by one token inside.*target_fn="):
        lb.predict(net, theta, batch, progress=False)
    found = lb.predict(
        net,
        theta,
        batch,
        progress=False,
        call_fn=lambda model, batch: model(batch["input_ids"]).logits[:, :-1].mT,
        target_fn=lambda batch: batch["labels"][:, 1:],
    )
    own = net(**batch).loss.item()  # computed in float32
    assert found.nll == pytest.approx(own, rel=1e-6)
