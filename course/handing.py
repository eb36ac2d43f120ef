"""What a teacher hands out: the students' folder, and Gradescope's autograder."""

import json
import zipfile
import zlib

import answers
from cutting import FILES, cut, split
from running import HERE, ROOT, UserError, files_below

PLAIN = ["requirements.txt", "LICENSE", ".gitignore", "losses.safetensors"]  # go into the students' folder as they are
TEACHERS = [  # stay here
    "README.md", "handout.md", "handing.py", "proof.py", "figure.py", "autograder", "answers.py", "answers.md",
]  # fmt: skip


def cut_folder(project, target):
    """Writes the students' folder, or a zip of it if the name ends in .zip -> what to do next, in words."""
    files = students_files(project)
    if target.suffix == ".zip":
        write_zip({f"{target.stem}/{path}": data for path, data in files.items()}, target)
        return f"{target}: unpack it, then python course"
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} is not empty: name a new folder; nothing is ever overwritten")
        for path, data in files.items():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(data)
    except OSError as error:
        raise UserError(f"cannot write to {target}: {error.strerror}") from None
    return f"{target}: {len(project.exercises)} exercises. Begin with: cd {target} && python course"


def students_files(project):
    """{path: bytes} of the students' folder: emptied files, the checks, the reference sealed, and the hand-out."""
    emptied = cut(project.texts, project.exercises)
    files = {path: data for path, data in project.files.items() if not path.startswith("course/")}
    files |= {FILES[module]: text.encode() for module, text in emptied.items()}
    files |= {name: (ROOT / name).read_bytes() for name in PLAIN if (ROOT / name).exists()}
    sealed = {FILES[module]: text for module, text in project.texts.items()}
    for path, data in project.files.items():
        parts = path.split("/")
        if path.startswith("course/mistakes/"):
            sealed[path] = data.decode()
        elif parts[0] == "course" and parts[1] not in TEACHERS:
            files[path] = data
    files["course/sealed"] = zlib.compress(json.dumps(sealed).encode(), 9)
    files["README.md"] = handout(project).encode()
    answers.write(files)
    return files


def handout(project):
    """The text that students read: how to begin, then every exercise."""
    exercises = []
    for e in project.exercises:
        names = ", ".join(f"`{split(t)[1]}` ({FILES[split(t)[0]]})" for t in e.TARGETS)
        head = f"## {e.number}. {e.TITLE}\n\n*{e.POINTS} points, about {e.MINUTES} minutes. To be written: {names}.*"
        exercises.append(f"{head}\n\n```text\n{e.text}\n```\n")
    words = {"COUNT": len(project.exercises), "POINTS": sum(e.POINTS for e in project.exercises)}
    words |= {"HOURS": f"{sum(e.MINUTES for e in project.exercises) / 60:.2g}", "EXERCISES": "\n".join(exercises)}
    text = (HERE / "handout.md").read_text("utf-8")
    for word, value in words.items():
        text = text.replace(word, str(value))
    return text


def cut_autograder(project, target):
    """Writes Gradescope's autograder.zip: the project, and the two scripts that Gradescope calls."""
    if target.suffix != ".zip":
        raise UserError(f"{target}: the autograder is a .zip file")
    files = dict(project.files)
    files["requirements.txt"] = (ROOT / "requirements.txt").read_bytes()
    for path in files_below(HERE / "autograder"):
        files.pop(f"course/autograder/{path.name}")
        files[path.name] = path.read_bytes()
    write_zip(files, target)
    return f"{target}: upload it as Gradescope's autograder"


def write_zip(files, target):
    try:
        with open(target, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, data in files.items():
                info = zipfile.ZipInfo(path, (2025, 1, 1, 0, 0, 0))  # the same bytes from the same project
                info.compress_type, executable = zipfile.ZIP_DEFLATED, data.startswith(b"#!")
                info.external_attr = (0o100755 if executable else 0o100644) << 16
                archive.writestr(info, data, compresslevel=1)  # most of it are weights, which hardly shrink
    except FileExistsError:
        raise UserError(f"{target} exists: name a new file; nothing is ever overwritten") from None
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
