"""What the medical tasks share: backbone, padding, facts, class weights, and lines that load an export."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import GraftError
from common.frozen import FrozenPrefix, content
from common.methods import MethodSpec
from common.task import AdaptedTask, Backbone, OptimSpec
from domains.medical.backbones import MedicalBackbone, build, features
from domains.medical.data._records import IGNORE, VolumeBatch, VolumeFacts
from domains.medical.losses import balanced_weights, given_weights


class MedicalTask(AdaptedTask):
    """What the medical tasks share: backbone, padding, facts, class weights."""

    domain: ClassVar[str] = "medical"
    facts: VolumeFacts

    def __init__(
        self,
        *,
        peft: MethodSpec,
        optim: OptimSpec,
        settings: Mapping[str, Any],
        seed: int,
        gradient_checkpointing: bool,
    ) -> None:
        super().__init__(
            peft=peft, optim=optim, settings=settings, seed=seed, gradient_checkpointing=gradient_checkpointing
        )
        self._built: MedicalBackbone
        self._balanced: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Weigh the classes by the training labels where that is asked for, and build everything."""
        if self.settings["class_weights"] == "balanced" and not hasattr(self, "backbone"):
            data = self._datamodule()
            self._balanced = balanced_weights(self._train_labels(data), len(data.facts.class_names), IGNORE)
        super().setup(stage)

    def _train_labels(self, data: Any) -> Iterable[Tensor]:  # noqa: ANN401
        """Yield the labels of the training cases, one tensor a case."""
        raise NotImplementedError

    def _class_weights(self) -> Tensor | None:
        given = self.settings["class_weights"]
        if isinstance(given, str):
            # Where there is no data to count in (export, predict) nothing is trained either.
            return self._balanced if given == "balanced" else None
        return given_weights(given, self.facts.class_names)

    def build_backbone(self) -> Backbone:
        """Build the named network for the data's axes, channels, classes and patches."""
        facts = self.facts
        self._built = build(
            self.settings["backbone"],
            spatial_dims=facts.spatial_dims,
            channels=facts.channels,
            classes=len(facts.class_names),
            patch_size=facts.patch_size,
            pretrained=self.settings["pretrained"],
            weights=self.settings["weights"],
            net=self.settings["net"],
        )
        return self._built

    def features(self, batch: VolumeBatch) -> Tensor:
        """Return the backbone's features (B, width, *spatial or coarser) of images padded to what it takes."""
        images = self._padded(batch)
        if self.frozen_rows is None:
            return features(self._built, self.backbone, images)
        identities = [content(image) for image in images.cpu()]
        alone = self.frozen_rows.rows(
            identities, lambda item: (features(self._built, self.backbone, images[item : item + 1])[0],)
        )
        return torch.stack([row[0] for row in alone])

    def _padded(self, batch: VolumeBatch) -> Tensor:
        sides = batch.image.shape[2:]
        step = self._built.divisor
        wanted = self._built.input_size or tuple(-(-side // step) * step for side in sides)
        missing = [more - side for side, more in zip(sides, wanted, strict=True)]
        images = batch.image
        if any(missing) and min(missing) >= 0:
            images = functional.pad(images, [end for side in reversed(missing) for end in (0, side)])
        return images

    def frozen_prefix(self) -> FrozenPrefix | None:
        """Return the whole network up to its output layer where its features are to be cached.

        Raises:
            GraftError: No image comes twice, since the data augments or cuts its patches at random.
        """
        if not self.settings["cache_features"]:
            return None
        data = self._datamodule()
        if data.augment:
            raise GraftError("cache_features needs the same images in every epoch. Set the data's augment to false.")
        case = data.case("train", 0)
        sides, patch = tuple(case["image"].shape[1:]), self.facts.patch_size
        if case["label"].ndim and any(side > part for side, part in zip(sides, patch, strict=True)):
            raise GraftError(
                f"cache_features needs the same images in every epoch, and patches of {patch} are cut at random out of "
                f"{sides}. Set the data's patch_size to the whole size."
            )
        return FrozenPrefix(modules={"backbone": self.backbone}, transform={"backbone": self._built.name})

    def targets(self, batch: VolumeBatch) -> Tensor:
        """Return the labels."""
        return batch.label

    def example_batch(self) -> VolumeBatch:
        """Make two patches of seeded noise."""
        facts = self.facts
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(2, facts.channels, *facts.patch_size, generator=generator)
        device = next(self.backbone.parameters()).device
        return VolumeBatch(
            images.to(device), self._example_labels(generator).to(device), torch.arange(2, device=device)
        )

    def _example_labels(self, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def describe_facts(self) -> dict[str, Any]:
        """Return all that is needed to read and predict a new file."""
        facts = self.facts
        described = {
            "spatial_dims": facts.spatial_dims,
            "channels": facts.channels,
            "class_names": facts.class_names,
            "spacing": facts.spacing,
            "patch_size": facts.patch_size,
            "preprocessing": dict(facts.preprocessing),
        }
        return json.loads(json.dumps(described))  # lists for tuples, as they come back from a file

    def load_facts(self, facts: Mapping[str, Any]) -> None:
        """Set the facts from an adapter's record."""
        self.facts = VolumeFacts(
            spatial_dims=facts["spatial_dims"],
            channels=facts["channels"],
            class_names=tuple(facts["class_names"]),
            spacing=tuple(facts["spacing"]),
            patch_size=tuple(facts["patch_size"]),
            preprocessing=dict(facts["preprocessing"]),
            name="",
            digest="",
        )

    def describe_data(self, data: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return name, digest, sizes, classes and the number of skipped cases."""
        facts = self.facts
        return {
            "name": facts.name,
            "digest": facts.digest,
            **facts.counts,
            "classes": list(facts.class_names),
            "skipped": facts.skipped,
        }

    def usage(self) -> str:
        """Return lines that load the export with peft and safetensors onto the network that Graft takes apart."""
        from common.tuners import is_own

        facts, settings = self.facts, self.settings
        options: dict[str, Any] = {
            "spatial_dims": facts.spatial_dims,
            "channels": facts.channels,
            "classes": len(facts.class_names),
            "patch_size": facts.patch_size,
            **{key: settings[key] for key in ("pretrained", "weights", "net")},
        }
        given = ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
        tuned = "model = PeftModel.from_pretrained(built.model, FOLDER).eval()"
        if self.attached.plan.mode == "full":
            tuned = 'built.model.load_state_dict(load_file(f"{FOLDER}/model.safetensors"))\nmodel = built.model.eval()'
        elif self.attached.plan.mode == "frozen":
            tuned = "model = built.model.eval()"
        own = is_own(getattr(self.attached.plan.peft_config, "peft_type", None))
        registered = "import common.tuners  # registers Graft's own tuners with peft\n" if own else ""
        name = type(self.head).__name__
        sides = "multiples of " + str(self._built.divisor) if self._built.input_size is None else self._built.input_size
        return (
            "from peft import PeftModel\nfrom safetensors.torch import load_file\n"
            "from domains.medical.backbones import build, features  # takes the output layer off the network\n"
            f"from domains.medical.heads import {name}\n{registered}"
            f"built = build({settings['backbone']!r}, {given})\n{tuned}\n"
            f"head = {name}({self._head_arguments()}).eval()\n"
            'head.load_state_dict(load_file(f"{FOLDER}/head.safetensors"))\n'
            f"# images: (B, {facts.channels}, *spatial) as domains.medical.data.prepare makes them, sides {sides}\n"
            "logits = head(features(built, model, images))\n"
        )

    def _head_arguments(self) -> str:
        """Return the arguments that build the head anew, as they stand in code."""
        raise NotImplementedError
