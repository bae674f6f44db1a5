"""What the tables need, read off the papers' own rows and a scale's options: trainings, models, and pictures to draw.

The standard library alone, so that planning takes no time. ``jobs.py`` does the work, the ``Snakefile`` orders it.

    run    one training: a method, its options, concepts, a seed. Makes one edit, or one for each concept (SepME jointly)
    model  a sum of edits, written as their files; the empty sum is the base model
    cell   the pictures that one model draws of some concepts, measured: one JSON file, which all tables share

Runs and cells are named by what they are made of, with a digest of every option: what two tables both need is made once,
and a changed option makes new files instead of wrong ones. What an options file leaves unsaid is the method's default,
which is in no name, nor is the methods' code: after a change there, remove ``build/tables``.
"""

import csv
import hashlib
import json
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent
STYLES = ["Van Gogh", "Picasso", "Cezanne"]  # the papers' concepts, in the order of those that stand for them
OBJECTS = [
    "chain saw", "church", "gas pump", "tench", "garbage truck", "english springer", "golf ball", "parachute",
    "french horn",
]  # fmt: skip
TRIOS = {"sepme-8": ["chain saw", "gas pump", "garbage truck"]}  # erased together; else Van Gogh, Cezanne, Picasso
RETRAINED = ("sepme-2", "sepme-3")  # tables whose combinations are trained as such; in the others, edits are added


def slug(*names: str) -> str:
    """Names as a part of a file's name."""
    return "+".join(names).lower().replace(" ", "_").replace(".", "")


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


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

    def edit(self, *concepts: str) -> str:
        """The file of these concepts' edit, below the folder of all edits."""
        return f"{self.name}/{slug(*concepts)}.safetensors"


@dataclass(frozen=True)
class Cell:
    """Pictures of concepts, so many of each, by the sum of some edits."""

    edits: tuple[str, ...]
    counts: tuple[tuple[str, int], ...]
    pictures: str  # JSON text: the scale's options of drawing

    @property
    def name(self) -> str:
        label = "_".join(edit.split("/")[0].rsplit("-", 1)[0] for edit in self.edits) or "base"
        return f"{label[:150]}-{digest(asdict(self))}"


class Plan:
    """Everything that the tables of one scale need. ValueError for a scale that has no options file."""

    def __init__(self, scale: str):
        path = DATA / "scales" / f"{scale}.toml"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.toml")))
            raise ValueError(f"unknown scale {scale!r}: choose from {known}")
        self.scale, self.options = scale, tomllib.loads(path.read_text())
        world = tomllib.loads((DATA / "concepts.toml").read_text())
        world = world if self.options["world"] == "emoji" else world["stable_diffusion"]
        roles = world["roles"]
        self.styles = [s["name"] if isinstance(s, dict) else s for s in world["styles"]]
        self.objects = roles["nine_objects"]
        self.ours = dict(zip(STYLES + OBJECTS, roles["erased_styles"] + self.objects, strict=True))
        self.person = roles["forgotten_person"]
        self.neighbours = roles.get("neighbours", {})
        self.runs: dict[str, Run] = {}
        self.rows = {table: self._paper(table) for table in self.options["tables"]}
        counts = self.asked(self.rows)  # what tables share is asked for once, as often as the greediest of them asks
        pictures = json.dumps(self.options["pictures"], sort_keys=True)
        cells = {model: Cell(model, tuple(sorted(most.items())), pictures) for model, most in counts.items()}
        self.cell_of = {model: cell.name for model, cell in cells.items()}
        self.cells = {cell.name: cell for cell in cells.values()}
        self.reports = self._reports()

    @staticmethod
    def _paper(table: str) -> list[dict]:
        with open(DATA / "papers" / f"{table}.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def run(self, method: str, concepts: list[str], options: dict, seed: int) -> Run:
        """The run of these settings, remembered under its name."""
        run = Run(method, tuple(concepts), json.dumps(options, sort_keys=True), seed)
        return self.runs.setdefault(run.name, run)

    # --- from a row of the paper to models and pictures

    def trained(self, table: str, method: str, setting: str, names: list[str], known: list[str], seed: int) -> Run:
        """The training behind a method's name in a table; names and known as the paper has them."""
        recipes = self.options["recipes"]
        forms = [f"{method} {setting}", f"{method} joint" if len(names) > 1 else method, method]
        options = dict(recipes[next(form for form in forms if form in recipes)])
        concepts, kind = [self.ours[name] for name in names], options.pop("method")
        if "tau" in options or kind in ("gcirs", "sepme"):
            taus = options.pop("tau", {})
            if setting.startswith("tau="):
                taus = dict.fromkeys(names, float(setting.removeprefix("tau=")))
            options["tau"] = [taus.get(name, 0.0) * self.options["tau_unit"] for name in names]
        if kind == "sepme":
            options["known"] = [self.ours[name] for name in known]
        return self.run(kind, concepts, options, seed)

    def model(self, table: str, method: str, setting: str, erased: str, seed: int) -> tuple[str, ...]:
        """The edits whose sum a row speaks of."""
        if method == "original" or erased == "nothing":
            return ()
        names = erased.split("+")
        trio = TRIOS.get(table, ["Van Gogh", "Cezanne", "Picasso"])
        if method == "SepME":  # trained all at once, one edit for each
            run = self.trained(table, method, setting, trio, trio, seed)
            return tuple(run.edit(self.ours[name]) for name in names)
        if table in RETRAINED or (len(names) == 1 and not method.startswith("SepME")):
            run = self.trained(table, method, setting, names, [], seed)
            return (run.edit(*run.concepts),)
        runs = []
        for name in names:
            here, known = method, [other for other in trio if other != name]
            if method == "SepME2":  # the first by G-CiRs, the later ones know those before them
                here, known = ("G-CiRs", []) if name == trio[0] else (method, trio[: trio.index(name)])
            runs.append(self.trained(table, here, setting if here == method else "", [name], known, seed))
        return tuple(run.edit(*run.concepts) for run in runs)

    def pictures(self, table: str, erased: str, evaluated: str) -> dict[str, int]:
        """Whose pictures a row shares out, and how many of each: our names."""
        named, others = self.options["pictures"]["named"], self.options["pictures"]["others"]
        if evaluated == "":
            return {}
        if evaluated != "Others":
            return {self.ours[evaluated]: named}
        concepts = self.objects if table in ("sepme-7", "sepme-8") else self.styles
        names = [erased] if table == "sepme-7" else TRIOS.get(table, STYLES)
        return dict.fromkeys([c for c in concepts if c not in {self.ours[name] for name in names}], others)

    def atoms(self, table: str, row: dict, seed: int) -> list[tuple[float, tuple[str, ...], dict[str, int]]]:
        """What a row's figure is the weighted sum of: (weight, model, pictures)."""
        erased, evaluated = row["erased"], row["evaluated"]
        if erased == "sum":
            parts = [(1.0 if a == b else -1.0, a, b) for a in STYLES for b in STYLES]
        elif erased == "average":
            parts = [(1 / 9, o, o if evaluated == "average" else evaluated) for o in OBJECTS]
        elif evaluated == "erased - kept":
            parts = [*((1.0, erased, name) for name in erased.split("+")), (-1.0, erased, "Others")]
        else:
            parts = [(1.0, erased, evaluated)]
        return [
            (weight, self.model(table, row["method"], row["setting"], e, seed), self.pictures(table, e, ev))
            for weight, e, ev in parts
        ]

    def asked(self, tables: Iterable[str]) -> dict[tuple[str, ...], dict[str, int]]:
        """model -> concept -> the most pictures that these tables ask of it, over all training seeds."""
        counts: dict[tuple[str, ...], dict[str, int]] = {}
        for table in tables:
            for row in self.rows[table]:
                for seed in self.options["seeds"]:
                    for _, model, asked in self.atoms(table, row, seed):
                        most = counts.setdefault(model, {})
                        for concept, n in asked.items():
                            most[concept] = max(n, most.get(concept, 0))
        return counts

    def cells_of(self, table: str) -> list[str]:
        """The cells that a table is collected from."""
        return sorted(self.cell_of[model] for model in self.asked([table]))

    # --- what the jobs ask for

    def edit_names(self, run: Run) -> list[str]:
        """How the edits of a run are named: one for all of its concepts, or with SepME one for each."""
        return [slug(c) for c in run.concepts] if run.method == "sepme" else [slug(*run.concepts)]

    def shared_pictures(self, run: Run) -> str | None:
        """The name of the training pictures that a run shares with others: of bare names, if its options say how many."""
        options = json.loads(run.options)
        bare = run.method in ("fmn_sepme", "gcirs", "sepme") or options.get("variant") == "sepme-code"
        return f"{slug(*run.concepts)}-{options['images']}-{run.seed}" if bare and "images" in options else None

    def base_counts(self) -> dict[str, int]:
        """How many of the base's pictures the cells need, by concept."""
        most: dict[str, int] = {}
        for cell in self.cells.values():
            for concept, n in cell.counts:
                most[concept] = max(n, most.get(concept, 0))
        return most

    def kind(self, concept: str) -> str:
        return "style" if concept in self.styles else "person" if concept == self.person else "object"

    # --- every method on one style, one object and one person

    def _reports(self) -> dict[str, Run]:
        """The runs of ``methods.csv``: name -> run."""
        if "methods" not in self.options:
            return {}
        concepts = {"style": self.ours["Van Gogh"], "object": self.ours["church"], "person": self.person}
        runs = [
            self.run(method, [concept], dict(options), seed)
            for method, options in self.options["methods"].items()
            for concept in (concepts[kind] for kind in self.options["report"]["kinds"])
            for seed in self.options["seeds"]
        ]
        return {run.name: run for run in runs}
