# The papers' tables as a run that may be killed anywhere and goes on: `make tables`, `make tables SCALE=paper`.
# A scale's options: data/scales/SCALE.toml. What follows from them: data/scales/plan.py. The work: data/scales/jobs.py.
import fcntl
import json
import sys
from pathlib import Path

sys.path.insert(0, f"{workflow.basedir}/data/scales")
import plan
from workers import Workers

PLAN = plan.Plan(config.get("scale", "small"))
OPTIONS = PLAN.options
BUILD = f"build/tables/{PLAN.scale}"
RESULTS, FIGURES = f"{BUILD}/results", f"{BUILD}/figures"  # from here they are published: see rule all
BASE_COUNTS = PLAN.base_counts()
BASE = {plan.slug(concept, str(n)): (concept, n) for concept, n in BASE_COUNTS.items()}
DRAWN = f"{BUILD}/base/{plan.digest(OPTIONS['pictures'])}"  # other options, other pictures
REPORTS = f"{BUILD}/reports/{plan.digest(OPTIONS.get('report'), OPTIONS['pictures'])}"
SHARED = {PLAN.shared_pictures(run): run for run in PLAN.runs.values() if PLAN.shared_pictures(run)}
WORK = Workers(config.get("work", "jobs"), workflow.resource_settings.cores or 1)
GPU = OPTIONS.get("gpu", 0)
JUDGE = [] if OPTIONS["world"] == "emoji" else [f"{BUILD}/judge.safetensors"]
CLASSES = {plan.slug(style): style for style in [*PLAN.styles, "blank"]}  # of that judge
LOCK = []

onstart:  # one run at a time; the kernel takes this lock back from a process that is killed, unlike Snakemake's own
    Path(BUILD).mkdir(parents=True, exist_ok=True)
    LOCK.append(open(f"{BUILD}/run.lock", "w"))
    try:
        fcntl.flock(LOCK[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkflowError(f"another run of the scale {PLAN.scale!r} is at work here: wait for it, or end it first")
    made, asked = Path(BUILD) / "scale.json", {name: OPTIONS.get(name) for name in ("world", "dtype", "precision", "judge_images")}
    if made.exists() and json.loads(made.read_text()) != asked:  # these are in no file's name
        raise WorkflowError(f"{BUILD} was made with {made.read_text()}, not with {asked}: remove that folder, or take the options back")
    made.with_suffix(".partial").write_text(json.dumps(asked))
    made.with_suffix(".partial").replace(made)
    # Snakemake 9 sets a timer after every job, which sets another one, for ever: its cost grows with the square of the number
    # of jobs. The timers serve its limit of jobs in a second, which nothing here needs.
    workflow.scheduler.job_rate_limiter = None

wildcard_constraints:
    name="[^/]+",

localrules:
    all, classify, table, methods, costs, figure,

rule all:  # publishes at the end, so that tables which are there already (committed, of an older run) spare nobody the work
    input:
        results=[f"{RESULTS}/{table}.csv" for table in [*PLAN.rows, *["methods"] * bool(PLAN.reports), "costs"]],
        figures=[f"{FIGURES}/{name}.png" for name in ["tables", *["methods"] * bool(PLAN.reports)]],
    output: f"{BUILD}/published.json",
    run:
        WORK.run("publish", {name: list(input.get(name)) for name in ("results", "figures")}, OPTIONS, output[0])

rule draw:  # the base's pictures of one concept, for every cell
    output: f"{DRAWN}/{{name}}.safetensors",
    resources: gpu=GPU,
    run:
        concept, n = BASE[wildcards.name]
        WORK.run("draw", OPTIONS, concept, list(range(n)), output[0])

rule draw_class:  # pictures to train the judge on, from seeds that nothing is measured on
    output: f"{BUILD}/classes/{{name}}.safetensors",
    resources: gpu=GPU,
    run:
        style, first = CLASSES[wildcards.name], 1_000_000
        WORK.run("draw", OPTIONS, "" if style == "blank" else style, list(range(first, first + OPTIONS["judge_images"])), output[0])

rule classify:
    input: [f"{BUILD}/classes/{name}.safetensors" for name in CLASSES],
    output: f"{BUILD}/judge.safetensors",
    run:
        WORK.run("classify", OPTIONS, dict(zip(CLASSES.values(), input)), output[0])

rule prepare:  # the training pictures of some concepts and one seed, for every method that takes them
    output: f"{BUILD}/drawn/{{name}}.json",
    resources: gpu=GPU,
    run:
        made = SHARED[wildcards.name]
        WORK.run("prepare", OPTIONS, list(made.concepts), json.loads(made.options)["images"], made.seed, output[0])

def material(wildcards):
    pictures = PLAN.shared_pictures(PLAN.runs[wildcards.name])
    return f"{BUILD}/drawn/{pictures}.json" if pictures else []

rule train:  # one training: an edit, or one for each concept
    input: material,
    output: directory(f"{BUILD}/edits/{{name}}"),
    resources: gpu=GPU,
    run:
        made = PLAN.runs[wildcards.name]
        settings, names = json.loads(made.options), PLAN.edit_names(made)
        WORK.run("train", OPTIONS, made.method, list(made.concepts), settings, made.seed, output[0], names)

def judged(files):
    return OPTIONS | {"judge": file for file in files}

rule measure:  # one cell: a sum of edits, the pictures it draws, and what the judge and LPIPS say of them
    input:
        edits=lambda w: sorted({f"{BUILD}/edits/{edit.split('/')[0]}" for edit in PLAN.cells[w.name].edits}),
        base=lambda w: [f"{DRAWN}/{plan.slug(c, str(BASE_COUNTS[c]))}.safetensors" for c, _ in PLAN.cells[w.name].counts],
        judge=JUDGE,
    output: f"{BUILD}/cells/{{name}}.json",
    resources: gpu=GPU,
    run:
        cell = PLAN.cells[wildcards.name]
        base = {concept: file for (concept, _), file in zip(cell.counts, input.base)}
        folders = {Path(folder).name: folder for folder in input.edits}
        files = [f"{folders[run]}/{file}" for run, file in (edit.split("/") for edit in cell.edits)]
        WORK.run("measure", judged(input.judge), files, dict(cell.counts), base, output[0])

rule report:  # every figure of one edit
    input:
        edit=f"{BUILD}/edits/{{name}}",
        judge=JUDGE,
    output: directory(f"{REPORTS}/{{name}}"),
    resources: gpu=GPU,
    run:
        made = PLAN.reports[wildcards.name]
        attack = made.seed in OPTIONS["report"]["attack_seeds"]
        (name,) = PLAN.edit_names(made)
        WORK.run("describe", judged(input.judge), f"{input.edit}/{name}.safetensors", attack, output[0])

rule table:
    input: lambda w: [f"{BUILD}/cells/{name}.json" for name in PLAN.cells_of(w.name)],
    output: f"{RESULTS}/{{name,sepme-[1-8]}}.csv",
    run:
        WORK.run("collect", PLAN, wildcards.name, list(input), output[0])

rule methods:
    input: [f"{REPORTS}/{name}" for name in PLAN.reports],
    output: f"{RESULTS}/methods.csv",
    run:
        WORK.run("collect_methods", PLAN, list(input), output[0])

rule costs:
    input:
        drawn=[f"{BUILD}/drawn/{name}.json" for name in SHARED],
        edits=[f"{BUILD}/edits/{name}" for name in PLAN.runs],
        cells=[f"{BUILD}/cells/{name}.json" for name in PLAN.cells],
        reports=[f"{REPORTS}/{name}" for name in PLAN.reports],
    output: f"{RESULTS}/costs.csv",
    run:
        files = {kind: list(input.get(kind)) for kind in ("drawn", "edits", "cells", "reports")}
        WORK.run("collect_costs", files, output[0])

rule figure:
    input: lambda w: [f"{RESULTS}/methods.csv"] if w.name == "methods" else [f"{RESULTS}/{table}.csv" for table in PLAN.rows],
    output: f"{FIGURES}/{{name,tables|methods}}.png",
    run:
        WORK.run(f"figure_of_{wildcards.name}", OPTIONS, list(input), output[0])
