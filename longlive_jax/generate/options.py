"""What a run of launch/generate.py was asked to read and write, and whether it can."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from longlive_jax.checkpoint import store
from longlive_jax.generate import request, snapshots, storyboard


@dataclasses.dataclass(frozen=True)
class Options:
  """What a run reads and writes; the flags of the script say what each one means."""

  prompt: tuple[str, ...] = ()
  prompts: str | None = None
  image: str | None = None
  images: str | None = None
  chunks: int | None = None
  durations: tuple[int, ...] = ()
  continue_from: str | None = None
  mode: str = "stream"
  output: str = "outputs/generate"
  save_state: str | None = None
  save_every: int = 0
  resume: str | None = None
  rewind_to: int | None = None


def expand_paths(options: Options) -> Options:
  """`~` in every path: the shell leaves it alone in --save_state=~/states."""
  names = ("prompts", "image", "images", "continue_from", "output", "save_state",
           "resume")  # fmt: skip
  paths = {name: getattr(options, name) for name in names}
  expanded = {n: str(Path(path).expanduser()) for n, path in paths.items() if path}
  return dataclasses.replace(options, **expanded)


def parse_durations(values: Sequence[str]) -> tuple[int, ...]:
  """Chunks of each prompt from the parts of --durations=3,2,4.

  Raises:
    ValueError: a part that is no whole number.
  """
  try:
    return tuple(int(value) for value in values)
  except ValueError as error:
    raise ValueError(
      f"durations={','.join(values)} must be whole numbers of chunks with commas "
      "between them; use --durations=3,2,4 for three prompts"
    ) from error


def check_overwrites(options: Options, output: Path, snapshot: Path | None) -> None:
  """Raises ValueError where a run would destroy, or mix with, what another one made."""
  videos = [path.resolve() for path in output.glob("video*.mp4")]
  source = Path(options.continue_from).resolve() if options.continue_from else None
  if (snapshot is not None and videos) or source in videos:
    raise ValueError(
      f"output={output} holds a video that this one would overwrite; give another "
      "--output"
    )
  start = 0 if snapshot is None else int(snapshot.name.removeprefix("chunk_"))
  if options.save_state:
    later = [c for c in snapshots.chunks(options.save_state) if c > start]
    if later:
      raise ValueError(
        f"save_state={options.save_state} already holds states of another run, after "
        f"chunks {later}; choose an empty folder"
      )


def find_storyboard(options: Options) -> tuple[storyboard.Storyboard, Path | None]:
  """The storyboard of the whole video, and the snapshot to resume, if any.

  A resumed run goes on with its own storyboard, or with new prompts: these follow the
  chunks that are done, as a new shot if the first one starts with the cut prefix.
  """
  new = dict(
    shots=options.prompt,
    prompts=options.prompts,
    image=options.image,
    images=options.images,
    chunks=options.chunks,
    durations=options.durations,
  )
  if not options.resume:
    return request.build_storyboard(**new), None
  snapshot = snapshots.find(options.resume, options.rewind_to)
  try:
    board = storyboard.from_record(store.load_metadata(snapshot)["storyboard"])
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(f"resume={snapshot} cannot be used: {error}") from error
  done = int(snapshot.name.removeprefix("chunk_"))
  if not (options.prompt or options.prompts):
    if options.chunks is not None:
      raise ValueError(f"chunks={options.chunks} needs new prompts when resuming")
  else:
    prefix = storyboard.SCENE_CUT_PREFIX.strip()
    cut = bool(options.prompt) and options.prompt[0].startswith(prefix)
    board = board.continued(done, request.build_storyboard(**new), cut)
  if done >= board.chunks:
    raise ValueError(
      f"resume={snapshot} is at the end of its {board.chunks} chunks; add prompts, or "
      "rewind with --rewind_to"
    )
  return board, snapshot
