"""The shared core: parameter-efficient fine-tuning for any PyTorch backbone.

The core knows PyTorch, Lightning and PEFT; it knows no domain. Importing this package is cheap: nothing
heavier than the standard library is loaded until a room that needs it is imported.
"""

__version__ = "0.1.0"
