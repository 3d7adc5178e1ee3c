"""The models. `base` says what every model is, each file holds models of one kind, `registry` builds one by name."""

from ncf_dist.models.base import Embedding, RankingSide, Recommender, Side
from ncf_dist.models.factorisation import GMF, MF, Product
from ncf_dist.models.history import History
from ncf_dist.models.item_to_item import ItemToItem
from ncf_dist.models.latest import latest
from ncf_dist.models.registry import MODELS, build_model, outline, parameter_count
from ncf_dist.models.sequences import Sequences, Users, Windows
from ncf_dist.models.towers import MLP, EmbeddingNN, FirstLayer, NeuMF, Tower

# fmt: off
__all__ = [
    "GMF", "MF", "MLP", "MODELS", "Embedding", "EmbeddingNN", "FirstLayer", "History", "ItemToItem", "NeuMF",
    "Product", "RankingSide", "Recommender", "Sequences", "Side", "Tower", "Users", "Windows", "build_model", "latest",
    "outline", "parameter_count",
]
