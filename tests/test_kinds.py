"""What a config chooses by name: every name leads somewhere, and a config allows just these."""

import typing

import pytest

from stackwise import kinds
from stackwise.config.base import StackWiseConfig
from stackwise.config.data import SourceName
from stackwise.config.growth import PrecisionName
from stackwise.config.model import AttentionType
from stackwise.config.objectives import ObjectiveName
from stackwise.config.optimization import OptimizerName
from stackwise.config.run import StrategyName, TrackerName
from stackwise.data.corpus import Corpus
from stackwise.errors import UserError
from stackwise.objectives.base import CrossEntropyObjective
from stackwise.ops.storage import Storage
from stackwise.optim.kinds import Optimizer

CLASSES = {"OBJECTIVES": CrossEntropyObjective, "OPTIMIZERS": Optimizer, "STORAGES": Storage}
NAMES = {
    "ATTENTION_TYPES": AttentionType,
    "CORPORA": SourceName,
    "CURRICULA": StrategyName,
    "OBJECTIVES": ObjectiveName,
    "OPTIMIZERS": OptimizerName,
    "STORAGES": PrecisionName,
    "TRACKERS": TrackerName,
}


@pytest.mark.parametrize(
    "kind", [name for name, value in vars(kinds).items() if name.isupper() and isinstance(value, dict)]
)
def test_every_name_is_allowed_in_a_config_and_leads_to_a_thing_of_its_kind(kind):
    assert typing.get_args(NAMES[kind]) == tuple(vars(kinds)[kind])
    for entry in vars(kinds)[kind].values():
        found = entry.load()
        assert issubclass(found, CLASSES[kind]) if kind in CLASSES else callable(found)


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(UserError, match=r"optimizer_type: 'adamv' .*allowed: adamw, muon, sgd; did you mean adamw"):
        StackWiseConfig.from_dict({"training": {"optimizer": {"optimizer_type": "adamv"}}})


def test_the_sources_of_python_open_as_a_corpus(tmp_path):
    corpus = kinds.CORPORA["python-stdlib"].load()(StackWiseConfig().data, tmp_path)
    assert isinstance(corpus, Corpus)
