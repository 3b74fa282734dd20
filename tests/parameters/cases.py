"""Small networks of the kinds that break keyed-by-position code, with an input for each."""

import torch
from torch import nn


class ClassToken(nn.Module):
    """Owns parameters and children, as a vision transformer does."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x):
        return self.layer(torch.cat([self.token.expand(len(x), -1, -1), x], 1)) * self.temperature


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.middle = nn.Linear(3, 3)
        self.decoder = nn.Linear(3, 3)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.middle(self.encoder(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def weight_normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, 2))


MODELS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)), (5, 1, 4, 4)),
    "class-token": (ClassToken, (5, 3, 4)),
    "tied": (Tied, (5, 3)),
    "recurrent": (Recurrent, (5, 6, 3)),
    "weight-norm": (weight_normed, (5, 3)),
}


def build(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make, shape = MODELS[name]
        return make().eval(), torch.randn(shape)
