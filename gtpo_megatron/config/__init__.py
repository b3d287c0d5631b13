"""The run's configuration: frozen, typed sections, a file each; every rule that needs no model is checked here, within seconds."""

from gtpo_megatron.config.alarm import AlarmConfig
from gtpo_megatron.config.algorithm import AlgorithmConfig, GateConfig, ImportanceConfig
from gtpo_megatron.config.checkpoint import CheckpointConfig
from gtpo_megatron.config.data import DataConfig, FieldMap
from gtpo_megatron.config.evaluation import EndpointConfig, EvaluationConfig, SuiteConfig
from gtpo_megatron.config.logging import LoggingConfig
from gtpo_megatron.config.model import Fp8Config, LoraConfig, ModelConfig
from gtpo_megatron.config.optimizer import OptimizerConfig
from gtpo_megatron.config.parallel import ParallelConfig
from gtpo_megatron.config.rewards import RewardConfig, RewardTerm
from gtpo_megatron.config.rollout import DynamicSampling, RolloutConfig
from gtpo_megatron.config.run import RunConfig
from gtpo_megatron.config.section import Section
from gtpo_megatron.config.sglang import SGLangConfig
from gtpo_megatron.config.training import ProfileConfig, TrainingConfig

__all__ = [
    "AlarmConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "DataConfig",
    "DynamicSampling",
    "EndpointConfig",
    "EvaluationConfig",
    "FieldMap",
    "Fp8Config",
    "GateConfig",
    "ImportanceConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RewardConfig",
    "RewardTerm",
    "RolloutConfig",
    "RunConfig",
    "SGLangConfig",
    "Section",
    "SuiteConfig",
    "TrainingConfig",
]
