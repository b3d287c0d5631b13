"""A whole run: the sections together."""

from pathlib import Path

from pydantic import Field

from gtpo_megatron.config.alarm import AlarmConfig
from gtpo_megatron.config.algorithm import AlgorithmConfig
from gtpo_megatron.config.checkpoint import CheckpointConfig
from gtpo_megatron.config.data import DataConfig
from gtpo_megatron.config.evaluation import EvaluationConfig
from gtpo_megatron.config.logging import LoggingConfig
from gtpo_megatron.config.model import ModelConfig
from gtpo_megatron.config.optimizer import OptimizerConfig
from gtpo_megatron.config.parallel import ParallelConfig
from gtpo_megatron.config.rewards import RewardConfig
from gtpo_megatron.config.rollout import RolloutConfig
from gtpo_megatron.config.section import Section
from gtpo_megatron.config.training import TrainingConfig


class RunConfig(Section):
    """A whole run: what a recipe file holds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the run")
    dir: str = Field("runs", description="parent directory; the run writes to <dir>/<name>")
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    rewards: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    alarm: AlarmConfig = AlarmConfig()

    @property
    def path(self) -> Path:
        """The run's directory."""
        return Path(self.dir) / self.name
