"""The recipe: blocks, the algorithm table, loading."""

from rlflow.recipe.algorithm_blocks import (
    AdvantageBlock,
    AlgorithmBlock,
    CorrectionBlock,
    CriticBlock,
    GroupBlock,
    KLBlock,
    PolicyLossBlock,
    PreferenceBlock,
)
from rlflow.recipe.block import Block
from rlflow.recipe.loading import dump_recipe, load_recipe
from rlflow.recipe.model_blocks import AdapterBlock, ModelBlock, RouterBlock
from rlflow.recipe.presets import ALGORITHMS, AlgorithmRow
from rlflow.recipe.problems import Problem, RecipeError
from rlflow.recipe.reward_blocks import RewardBlock, RewardServerBlock
from rlflow.recipe.rollout_server import RolloutServerBlock
from rlflow.recipe.schema import (
    DataBlock,
    EvaluationBlock,
    Recipe,
    ReferenceBlock,
    RolloutBlock,
    RunBlock,
    SourceBlock,
    TrackerName,
)
from rlflow.recipe.trainer_blocks import DeepSpeedBlock, FsdpBlock, OptimizerBlock, TrainerBlock

__all__ = [
    "ALGORITHMS",
    "AdapterBlock",
    "AdvantageBlock",
    "AlgorithmBlock",
    "AlgorithmRow",
    "Block",
    "CorrectionBlock",
    "CriticBlock",
    "DataBlock",
    "DeepSpeedBlock",
    "EvaluationBlock",
    "FsdpBlock",
    "GroupBlock",
    "KLBlock",
    "ModelBlock",
    "OptimizerBlock",
    "PolicyLossBlock",
    "PreferenceBlock",
    "Problem",
    "Recipe",
    "RecipeError",
    "ReferenceBlock",
    "RewardBlock",
    "RewardServerBlock",
    "RolloutBlock",
    "RolloutServerBlock",
    "RouterBlock",
    "RunBlock",
    "SourceBlock",
    "TrackerName",
    "TrainerBlock",
    "dump_recipe",
    "load_recipe",
]
