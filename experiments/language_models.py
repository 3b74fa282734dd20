"""Character models, an LSTM and a small GPT: ``model(inputs)`` of shape (B, T) gives logits (B, C, T)."""

import torch
from torch import Tensor, nn

MODELS = ("LSTM", "GPT")


class CharacterModel(nn.Module):
    """Embed, go through a body, and read the next character's logits off with the embedding again (tied weights).

    Args:
        num_classes: C, the number of characters.
        hidden: Width.
        rate: Of dropout, on what goes into the body and on what comes out.
    """

    def __init__(self, num_classes: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, hidden)
        self.head = nn.Linear(hidden, num_classes)
        self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(rate)
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.zeros_(self.head.bias)

    def body(self, embedded: Tensor) -> Tensor:
        """Map ``(B, T, hidden)`` to the same shape; position t may depend on those up to t alone."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.body(self.embedding(inputs))))
        return logits.mT


class LSTM(CharacterModel):
    """Recurrent layers that begin each window with an empty memory.

    Args:
        num_classes: C.
        hidden: Width.
        layers: Recurrent layers.
        rate: Of dropout.

    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997).
    """

    def __init__(self, num_classes: int, hidden: int, layers: int, rate: float) -> None:
        super().__init__(num_classes, hidden, rate)
        between = rate if layers > 1 else 0.0
        self.recurrent = nn.LSTM(hidden, hidden, layers, batch_first=True, dropout=between)

    def body(self, embedded: Tensor) -> Tensor:
        # what is small as a row of logits is large enough as an input: perplexity 7, not 15, after two epochs
        output: Tensor = self.recurrent(self.dropout(embedded.shape[-1] ** 0.5 * embedded))[0]
        return output


class GPT(CharacterModel):
    """A transformer whose positions see those before them alone, normalised before each part.

    Args:
        num_classes: C.
        hidden: Width.
        layers: Blocks of attention and perceptron.
        heads: Of attention; they divide the width.
        length: Most positions.
        rate: Of dropout.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
    """

    def __init__(self, num_classes: int, hidden: int, layers: int, heads: int, length: int, rate: float) -> None:
        super().__init__(num_classes, hidden, rate)
        self.positions = nn.Parameter(torch.empty(length, hidden))
        nn.init.normal_(self.positions, std=0.05)
        block = nn.TransformerEncoderLayer(
            hidden, heads, 4 * hidden, rate, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
        for name, parameter in self.blocks.named_parameters():  # torch repeats one block: draw each anew
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02 if name.endswith(("out_proj.weight", "linear2.weight")) else 0.05)

    def body(self, embedded: Tensor) -> Tensor:
        length = embedded.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, embedded.device, embedded.dtype)
        output: Tensor = self.blocks(self.dropout(embedded + self.positions[:length]), mask, is_causal=True)
        return output


def make_model(
    name: str, num_classes: int, *, hidden: int, layers: int, heads: int, length: int, rate: float
) -> CharacterModel:
    """Make a network by its name, one of `MODELS`."""
    if name == "LSTM":
        return LSTM(num_classes, hidden, layers, rate)
    return GPT(num_classes, hidden, layers, heads, length, rate)
