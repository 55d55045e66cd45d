"""Where everything lies: the outputs of a profile's stages, its caches and its locks, each path spelled once."""

from dataclasses import dataclass
from pathlib import Path

from spo.config import Config
from spo.errors import DataError


@dataclass(frozen=True)
class Prepared:
    """The folder that `prepare` writes. A side is train, validation or test; pairs have no test side."""

    folder: Path

    def prompts_file(self, side: str) -> Path:
        return self.folder / "prompts" / f"{side}.txt"

    def pairs_file(self, side: str) -> Path:
        return self.folder / "preferences" / f"{side}.parquet"

    def file(self, kind: str, side: str) -> Path:
        """The file of an input as the table of stages names it: "prompts" or "preferences", and a side."""
        return self.prompts_file(side) if kind == "prompts" else self.pairs_file(side)

    def prompts(self, side: str, limit: int | None = None) -> list[str]:
        """The prompts of a side, the first `limit` of them; DataError where they are missing."""
        path = self.prompts_file(side)
        if not path.is_file():
            raise DataError(f"{path} is missing; run `python -m spo prepare`")
        return path.read_text(encoding="utf-8").splitlines()[:limit]


@dataclass(frozen=True)
class Workspace:
    """The files of one profile in the project's folder `root`. It makes no folder and reads only prompts."""

    config: Config
    root: Path = Path()

    @property
    def runs(self) -> Path:
        """What the profile's stages write."""
        return self.root / "runs" / self.config.profile

    def output(self, stage: str) -> Path:
        """What a stage writes: runs/<profile>/<stage>."""
        return self.runs / stage

    @property
    def prepared(self) -> Prepared:
        return Prepared(self.output("prepare"))

    def train_preference(self, name: str) -> Path:
        """What `train_preference` measures of a preference model."""
        return self.output("train_preference") / name

    def preference_model(self, name: str) -> Path:
        """The trained model, apart from its measurements: DVC would align anew whenever a duration changes."""
        return self.output("preference_models") / name

    def aligned(self, method: str, seed: int) -> Path:
        """What `align` writes for a method and a training seed."""
        return self.output("align") / method / f"seed-{seed}"

    def checkpoints(self, method: str, seed: int) -> list[Path]:
        """The checkpoint folders of a training in its order; empty where there are none."""
        return sorted((self.aligned(method, seed) / "checkpoints").glob("step-*"))

    @property
    def scorers(self) -> Path:
        """The modules of preference models of kind custom."""
        return self.root / "data" / "scorers"

    @property
    def evaluate(self) -> Path:
        return self.output("evaluate")

    @property
    def loras(self) -> Path:
        """The evaluated LoRAs, a folder for each method."""
        return self.evaluate / "lora"

    @property
    def report(self) -> Path:
        return self.output("report")

    def preferences(self, name: str) -> Path:
        """The pairs that people chose with `label`."""
        return self.root / "data" / "preferences" / name

    @property
    def studies(self) -> Path:
        """What people chose in studies, of all profiles."""
        return self.root / "data" / "studies"

    # Below is what DVC does not look at.

    def state(self, *job: str) -> Path:
        """What a job (stage, method, seed) continues from after it was stopped."""
        return self._cache("state").joinpath(*job)

    def lock(self, *job: str) -> Path:
        """The file that is locked while a job runs."""
        return self._cache("locks") / f"{'-'.join(job)}.lock"

    def shared_lock(self, *job: str) -> Path:
        """The same for a job that is not of one profile."""
        return self.root / ".cache" / "locks" / f"{'-'.join(job)}.lock"

    @property
    def pictures_cache(self) -> Path:
        """Pictures that were made for people to choose from."""
        return self._cache("pictures")

    @property
    def latents_cache(self) -> Path:
        """Latents and labels of the prepared pairs."""
        return self._cache("latents")

    @property
    def evaluation_cache(self) -> Path:
        """Images and scores of finished batches."""
        return self._cache("evaluate")

    def _cache(self, kind: str) -> Path:
        return self.root / ".cache" / kind / self.config.profile
