"""What the tables need, read off the papers' own rows and a scale's options: trainings and images.

The standard library alone, so that planning takes no time. ``jobs.py`` does the work, the
``Snakefile`` orders it.

    run    one training: a method, its options, concepts, a seed. It makes one edit, or one for each
           concept where the method keeps them apart
    model  a sum of edits, written as their files; the empty sum is the base model
    cell   the images that one model samples of some concepts, measured: one JSON file, which all
           tables share

Runs and cells are named by what they are made of, with a digest of every option: what two tables
both need is made once, and a changed option makes new files instead of wrong ones. What an options
file leaves unsaid is the method's default, which is in no name, nor is the methods' code: after a
change there, remove ``build/tables``.
"""

import csv
import json
import runpy
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

SCALES = Path(__file__).resolve().parent
DATA = SCALES.parent / "data"
IDENTITY = runpy.run_path(str(SCALES.parent / "helpers/identity.py"))  # ``helpers`` imports torch
STYLES = ["Van Gogh", "Picasso", "Cezanne"]  # the papers' concepts, in the order of our stand-ins
OBJECTS = [
    "chain saw", "church", "gas pump", "tench", "garbage truck", "english springer", "golf ball",
    "parachute", "french horn",
]  # fmt: skip
TRIO = ["Van Gogh", "Cezanne", "Picasso"]  # erased together, in this order
TRIOS = {"sepme-8": ["chain saw", "gas pump", "garbage truck"]}  # in this table instead
OF_OBJECTS = ("sepme-7", "sepme-8")  # tables whose "Others" are objects
RETRAINED = ("sepme-2", "sepme-3")  # whose combinations are trained as such; elsewhere edits add up
METHODS: dict[str, dict] = tomllib.loads((DATA / "methods.toml").read_text())  # the catalogue

Model = tuple[str, ...]


def slug(*names: str) -> str:
    """Names as a part of a file's name."""
    return "+".join(names).lower().replace(" ", "_").replace(".", "")


def digest(*parts) -> str:
    """Eight hex digits that stand for some JSON values."""
    return IDENTITY["value_digest"](parts)[:8]


@dataclass(frozen=True)
class Run:
    """One training. options: JSON text, so that runs can be compared."""

    method: str
    concepts: tuple[str, ...]
    options: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{slug(*self.concepts)}-{self.seed}-{digest(self.options)}"

    @property
    def edit_names(self) -> list[str]:
        """How its edits are named: one for all concepts, or one for each where they stay apart."""
        separable = METHODS[self.method]["separable"]
        return [slug(c) for c in self.concepts] if separable else [slug(*self.concepts)]

    @property
    def shared_images(self) -> str | None:
        """The name of the training images that it shares with other runs; None if it shares none.

        Images are shared if they are of bare names and the options say how many.
        """
        options = json.loads(self.options)
        bare = METHODS[self.method]["bare_names"]  # True, False, or the variant that it holds for
        shares = bare is True or (bare and bare == options.get("variant"))
        if not shares or "images" not in options:
            return None
        return f"{slug(*self.concepts)}-{options['images']}-{self.seed}"

    def edit(self, *concepts: str) -> str:
        """The file of these concepts' edit, below the folder of all edits."""
        return f"{self.name}/{slug(*concepts)}.safetensors"


@dataclass(frozen=True)
class Cell:
    """Images of concepts, so many of each, by the sum of some edits."""

    edits: Model
    counts: tuple[tuple[str, int], ...]
    evaluation: str  # JSON text: how the scale samples what it measures

    @property
    def name(self) -> str:
        label = "_".join(edit.split("/")[0].rsplit("-", 1)[0] for edit in self.edits) or "base"
        return f"{label[:150]}-{digest(asdict(self))}"


def options_of_scale(scale: str | Path) -> dict:
    """The options of one scale: a file of this folder by its name, or any other TOML file by path.

    ValueError for a name that has no file.
    """
    path = Path(scale) if str(scale).endswith(".toml") else SCALES / f"{scale}.toml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in SCALES.glob("*.toml")))
        raise ValueError(f"unknown scale {str(scale)!r}: choose from {known}, or give a TOML file")
    return tomllib.loads(path.read_text())


def paper_rows(table: str) -> list[dict]:
    """The cells of one printed table as text, in the order of print."""
    with open(DATA / "papers" / f"{table}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Plan:
    """Everything that the tables of one scale need. ValueError for a scale without options."""

    def __init__(self, scale: str | Path):
        self.scale, self.options = Path(scale).stem, options_of_scale(scale)
        names = tomllib.loads((DATA / "concepts.toml").read_text())
        if "concepts" in self.options:
            names = names[self.options["concepts"]]
        roles = names["roles"]
        self.styles = [s["name"] if isinstance(s, dict) else s for s in names["styles"]]
        self.objects = roles["nine_objects"]
        stand_ins = roles["erased_styles"] + self.objects
        self.ours = dict(zip(STYLES + OBJECTS, stand_ins, strict=True))
        self.person = roles["forgotten_person"]
        self.neighbours = roles.get("neighbours", {})
        self.runs: dict[str, Run] = {}
        self.rows = {table: paper_rows(table) for table in self.options["tables"]}
        # what tables share is sampled once, as often as the greediest of them asks
        counts = self.samples_needed(self.rows)
        how = json.dumps(self.options["evaluation"], sort_keys=True)
        cells = {
            model: Cell(model, tuple(sorted(most.items())), how) for model, most in counts.items()
        }
        self.cell_of = {model: cell.name for model, cell in cells.items()}
        self.cells = {cell.name: cell for cell in cells.values()}
        self.reports = self._reports()

    def run(self, method: str, concepts: list[str], options: dict, seed: int) -> Run:
        """The run of these settings, remembered under its name."""
        run = Run(method, tuple(concepts), json.dumps(options, sort_keys=True), seed)
        return self.runs.setdefault(run.name, run)

    # --- from a row of the paper to models and images

    def recipe(self, method: str, setting: str, together: bool) -> tuple[str, dict]:
        """The kit's method and the options behind a method's name in the papers."""
        recipes = self.options["recipes"]
        forms = [f"{method} {setting}", f"{method} joint" if together else method, method]
        options = dict(recipes[next(form for form in forms if form in recipes)])
        kind = options.pop("method")
        return kind, {**self.options.get("defaults", {}).get(kind, {}), **options}

    def trained(
        self, method: str, setting: str, names: list[str], known: list[str], seed: int
    ) -> Run:
        """The training behind a method's name in a table; names and known as the paper has them.

        Where a recipe stops by a threshold, each concept has its own: the paper's.
        """
        kind, options = self.recipe(method, setting, len(names) > 1)
        taus = options.pop("tau", None)
        if setting.startswith("tau="):
            taus = dict.fromkeys(names, float(setting.removeprefix("tau=")))
        if taus is not None:
            options["tau"] = [taus.get(name, 0.0) * self.options["tau_unit"] for name in names]
        if METHODS[kind]["separable"]:
            options["known"] = [self.ours[name] for name in known]
        return self.run(kind, [self.ours[name] for name in names], options, seed)

    def edits_of_row(self, table: str, method: str, setting: str, erased: str, seed: int) -> Model:
        """The edits whose sum a row speaks of."""
        if method == "original" or erased == "nothing":
            return ()
        names = erased.split("+")
        trio = TRIOS.get(table, TRIO)
        if method == "SepME":  # trained all at once, one edit for each
            run = self.trained(method, setting, trio, trio, seed)
            return tuple(run.edit(self.ours[name]) for name in names)
        if table in RETRAINED or (len(names) == 1 and not method.startswith("SepME")):
            run = self.trained(method, setting, names, [], seed)
            return (run.edit(*run.concepts),)
        runs = []
        for name in names:
            step, form, known = method, setting, [other for other in trio if other != name]
            if method == "SepME2":  # each later one knows those before it
                known = trio[: trio.index(name)]
                if not known:  # the first is G-CiRs'
                    step, form = "G-CiRs", ""
            runs.append(self.trained(step, form, [name], known, seed))
        return tuple(run.edit(*run.concepts) for run in runs)

    def images_of_row(self, table: str, erased: str, evaluated: str) -> dict[str, int]:
        """Whose images a row shares out, and how many of each: our names."""
        named, others = self.options["evaluation"]["named"], self.options["evaluation"]["others"]
        if evaluated == "":
            return {}
        if evaluated != "Others":
            return {self.ours[evaluated]: named}
        concepts = self.objects if table in OF_OBJECTS else self.styles
        names = [erased] if table == "sepme-7" else TRIOS.get(table, STYLES)
        left_out = {self.ours[name] for name in names}
        return dict.fromkeys([c for c in concepts if c not in left_out], others)

    def weighted_parts(
        self, table: str, row: dict, seed: int
    ) -> list[tuple[float, Model, dict[str, int]]]:
        """What a row's value is the weighted sum of: (weight, model, images)."""
        erased, evaluated = row["erased"], row["evaluated"]
        if erased == "sum":
            parts = [(1.0 if a == b else -1.0, a, b) for a in STYLES for b in STYLES]
        elif erased == "average":
            parts = [(1 / 9, o, o if evaluated == "average" else evaluated) for o in OBJECTS]
        elif evaluated == "erased - kept":
            parts = [(1.0, erased, name) for name in erased.split("+")]
            parts.append((-1.0, erased, "Others"))
        else:
            parts = [(1.0, erased, evaluated)]
        method, setting = row["method"], row["setting"]
        return [
            (
                weight,
                self.edits_of_row(table, method, setting, part, seed),
                self.images_of_row(table, part, on),
            )
            for weight, part, on in parts
        ]

    def samples_needed(self, tables: Iterable[str]) -> dict[Model, dict[str, int]]:
        """model -> concept -> the most images that these tables ask of it, over training seeds."""
        counts: dict[Model, dict[str, int]] = {}
        for table in tables:
            for row in self.rows[table]:
                for seed in self.options["seeds"]:
                    for _, model, images in self.weighted_parts(table, row, seed):
                        most = counts.setdefault(model, {})
                        for concept, n in images.items():
                            most[concept] = max(n, most.get(concept, 0))
        return counts

    # --- what the jobs ask for

    def cells_of(self, table: str) -> list[str]:
        """The cells that a table is collected from."""
        return sorted(self.cell_of[model] for model in self.samples_needed([table]))

    def base_counts(self) -> dict[str, int]:
        """How many of the base's images the cells need, by concept."""
        most: dict[str, int] = {}
        for cell in self.cells.values():
            for concept, n in cell.counts:
                most[concept] = max(n, most.get(concept, 0))
        return most

    def _reports(self) -> dict[str, Run]:
        """The runs of ``methods.csv``, name -> run: every method of the catalogue."""
        if "report" not in self.options:
            return {}
        concepts = {"style": self.ours["Van Gogh"], "object": self.ours["church"]}
        concepts["person"] = self.person
        runs = [
            self.run(method, [concept], self.options.get("methods", {}).get(method, {}), seed)
            for method in METHODS
            for concept in (concepts[kind] for kind in self.options["report"]["kinds"])
            for seed in self.options["seeds"]
        ]
        return {run.name: run for run in runs}
