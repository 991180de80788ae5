from .adapter import Adapters
from .engine import Engine
from .model import LanguageModel, lora_layout
from .packing import Example
from .peft_format import read_peft, write_peft
from .training_data import TrainingSet

__all__ = [
    "Adapters",
    "Engine",
    "Example",
    "LanguageModel",
    "TrainingSet",
    "lora_layout",
    "read_peft",
    "write_peft",
]
