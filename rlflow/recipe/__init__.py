"""The recipe: blocks, the algorithm table, loading."""

from rlflow.recipe.algorithm import (
    AlgorithmBlock,
    ClassificationBlock,
    EmbeddingBlock,
    GenerativeRerankerBlock,
    KTOBlock,
    OnlineBlock,
    PairBlock,
    RerankerBlock,
    RewardModelBlock,
    SampleBlock,
    SFTBlock,
    algorithm_of,
)
from rlflow.recipe.block import Block
from rlflow.recipe.data_blocks import DataBlock, SourceBlock
from rlflow.recipe.environment_blocks import EnvironmentBlock
from rlflow.recipe.evaluation_blocks import EvaluationBlock
from rlflow.recipe.loading import dump_recipe, load_recipe
from rlflow.recipe.model_blocks import AdapterBlock, ModelBlock, RouterBlock
from rlflow.recipe.presets import ALGORITHMS, TASKS, AlgorithmRow
from rlflow.recipe.problems import Problem, RecipeError
from rlflow.recipe.reference_block import ReferenceBlock
from rlflow.recipe.reward_blocks import RewardBlock, RewardServerBlock
from rlflow.recipe.rollout_server import RolloutServerBlock
from rlflow.recipe.schema import Recipe, RolloutBlock, RunBlock
from rlflow.recipe.tracking_blocks import ExperimentBlock, TrackerName
from rlflow.recipe.trainer_blocks import DeepSpeedBlock, FsdpBlock, OptimizerBlock, TrainerBlock

__all__ = [
    "ALGORITHMS",
    "TASKS",
    "AdapterBlock",
    "AlgorithmBlock",
    "AlgorithmRow",
    "Block",
    "ClassificationBlock",
    "DataBlock",
    "DeepSpeedBlock",
    "EmbeddingBlock",
    "EnvironmentBlock",
    "EvaluationBlock",
    "ExperimentBlock",
    "FsdpBlock",
    "GenerativeRerankerBlock",
    "KTOBlock",
    "ModelBlock",
    "OnlineBlock",
    "OptimizerBlock",
    "PairBlock",
    "Problem",
    "Recipe",
    "RecipeError",
    "ReferenceBlock",
    "RerankerBlock",
    "RewardBlock",
    "RewardModelBlock",
    "RewardServerBlock",
    "RolloutBlock",
    "RolloutServerBlock",
    "RouterBlock",
    "RunBlock",
    "SFTBlock",
    "SampleBlock",
    "SourceBlock",
    "TrackerName",
    "TrainerBlock",
    "algorithm_of",
    "dump_recipe",
    "load_recipe",
]
