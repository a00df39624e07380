"""The planner: its predictions against what was measured, its choices, its refusals."""

import dataclasses
import json
import pathlib

import jax
import pytest

from longlive_jax.generate import networks, planning
from longlive_jax.models import dit, vae
from longlive_jax.parallel import hardware, plan
from longlive_jax.parallel.hardware import GB, H200, HARDWARE
from longlive_jax.parallel.plan import Plan, Workload

RESULTS = pathlib.Path(__file__).parents[1] / "tools" / "results"
FULL = Workload(dit.size("ti2v-5b"), vae.VAE_SIZES["wan2.2"], y=44, x=80)
TOY = Workload(
  dit.size("toy"), vae.VAE_SIZES["toy"], y=8, x=8, branches=2, steps=8, itemsize=4
)


def devices(count: int = 1, memory: float = H200.memory) -> hardware.Hardware:
  return dataclasses.replace(H200, count=count, memory=memory)


# ------------------------------------------------------------------ predictions
@pytest.mark.parametrize("run", ["bf16", "w4a16_kv"])
def test_predictions_are_near_what_was_measured(run):
  report = json.loads((RESULTS / "bench_5b_h200_nvfp4.json").read_text())
  measured = report[run]
  settings = Plan(precision=measured["precision"], kv_format=measured["kv_format"])
  found = plan.predict(FULL, H200, settings)
  alone = plan.predict(dataclasses.replace(FULL, vae=None), H200, settings)
  peak = measured["peak_bytes"]
  if run == "w4a16_kv":  # the other one includes compiling the decoder
    peak = report["memory_4_steps"]["peak_bytes_after_18_chunks"]
  for predicted, value in (
    (1e3 * found.denoise_seconds, measured["dit_chunk_ms_median"]),
    (found.denoise_fps, measured["dit_fps"]),
    (found.fps, measured["end_to_end_fps_steady"]),
    (alone.peak, measured["dit_peak_bytes"]),
    (found.peak, peak),
  ):
    assert predicted == pytest.approx(value, rel=0.15)


@pytest.mark.parametrize(
  "run",
  ["fp8_held", "fp8_2_steps", "x2_other", "x2_split", "x4_split", "bf16_unrolled",
   "fp8_vae", "fp8_vae_2_steps", "x2_fp8_vae_split", "x2_fp8_vae_split_2_steps"],
)  # fmt: skip
def test_predictions_in_fp8_and_on_several_devices_are_near_it(run):
  measured = json.loads((RESULTS / f"bench_5b_h200_{run}.json").read_text())
  sampling = measured["sampling"]
  settings = Plan(
    sequence_devices=measured["sequence_devices"],
    decode_on=measured["decode_on"],
    precision=measured["precision"],
    kv_format=sampling["kv_format"],
    attention_format=sampling["attention_format"],
  )
  precision = measured["vae_precision"]
  workload = dataclasses.replace(
    FULL, steps=sampling["steps"], unrolled=True, vae_precision=precision
  )
  found = plan.predict(workload, H200, settings)
  assert found.denoise_fps == pytest.approx(measured["dit_fps"], rel=0.15)
  if settings.total > 1 or precision:
    assert found.fps == pytest.approx(measured["end_to_end_fps"], rel=0.15)


def test_layers_one_by_one_with_relative_rope_are_as_fast_but_hold_no_windows():
  settings = Plan(precision="fp8", kv_format="e4m3", attention_format="fp8")
  one = dataclasses.replace(FULL, unrolled=True)
  moving = dataclasses.replace(one, relative_rope=True)
  scanned, still, found = (
    plan.predict(workload, H200, settings) for workload in (FULL, one, moving)
  )
  share = H200.unrolled_share / H200.denoise_share
  assert found.denoise_seconds == pytest.approx(scanned.denoise_seconds / share)
  assert found.memory["temporaries"] < still.memory["temporaries"]


def test_tiles_of_a_picture_are_not_split():
  hardware = dataclasses.replace(H200, count=2)
  whole = dataclasses.replace(FULL, vae_precision="fp8")
  tiled = dataclasses.replace(whole, decode_tiles=4)
  found, other = (plan.choose(work, hardware).plan for work in (whole, tiled))
  assert found.decode_on == "split" != other.decode_on
  with pytest.raises(ValueError, match="decode_on='split' needs decode_tiles=1, not 4"):
    plan.choose(tiled, hardware, {"decode_on": "split"})


def test_adapters_take_memory():
  more = dataclasses.replace(FULL, adapter_parameters=10**9)
  apart = plan.predict(more, H200, Plan()).peak - plan.predict(FULL, H200, Plan()).peak
  assert apart == 2 * 10**9  # bytes


def test_what_is_added_up_and_what_overlaps():
  same, other = (plan.predict(FULL, H200, Plan(decode_on=w)) for w in ("same", "other"))
  assert same.seconds == same.denoise_seconds + same.stages["vae"]
  assert other.seconds == max(other.denoise_seconds, other.stages["vae"])
  assert other.decoder_memory and not same.decoder_memory
  moved = sum(same.memory.values()) - sum(other.memory.values())
  assert moved == other.decoder_memory["vae"] + sum(
    other.decoder_memory[part] for part in ("decoder_state", "frames")
  )
  split = plan.predict(FULL, H200, Plan(sequence_devices=4, decode_on="split"))
  assert split.stages["vae"] == pytest.approx(same.stages["vae"] / 4 / plan.APART)
  assert split.stages["exchange"] > 0 == same.stages["exchange"]
  assert 3 < same.denoise_seconds / split.denoise_seconds < 4


def test_the_host_can_be_the_slowest():
  slow = dataclasses.replace(H200, host=1e7)
  found = plan.predict(FULL, slow, Plan())
  assert found.seconds == found.stages["host_copy"] == FULL.frame_bytes / 1e7


def test_quantised_keys_are_exchanged_faster():
  plain = Plan(sequence_devices=2)
  packed = dataclasses.replace(plain, exchange_format="nvfp4")
  seconds = [plan.exchange_seconds(FULL, H200, p) for p in (plain, packed)]
  latency = 150 * 4 * plan.LATENCY
  ratio = (seconds[1] - latency) / (seconds[0] - latency)
  assert ratio == pytest.approx((2 * 16 + 2 * 4.5) / (4 * 16))


def test_devices_of_one_processor_are_not_faster():
  cpu = dataclasses.replace(HARDWARE["cpu"], count=8)
  videos = dataclasses.replace(TOY, batch=2)
  one, two = (plan.predict(videos, cpu, Plan(devices=n)) for n in (1, 2))
  assert two.denoise_seconds >= one.denoise_seconds * 0.999


# ------------------------------------------------------------------ choices
def test_one_device_with_room_is_used_as_it_is():
  assert plan.choose(FULL, H200).plan == Plan()
  assert plan.choose(FULL, H200, decode_frames=8).plan == Plan(decode_frames=8)


@pytest.mark.parametrize("count", [1, 8])
def test_on_a_cpu_nothing_changes(count):
  cpu = dataclasses.replace(HARDWARE["cpu"], count=count)
  for batch in (1, 4):
    found = plan.choose(dataclasses.replace(TOY, batch=batch), cpu, decode_frames=8)
    assert found.plan == Plan(decode_frames=8)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_devices_share_one_video(count):
  found = plan.choose(FULL, devices(count))
  assert found.plan.total == count
  numbers = found.plan.precision, found.plan.kv_format, found.plan.exchange_format
  assert numbers == ("", "", "")
  assert found.fps > 0.75 * count * plan.choose(FULL, H200).fps


def test_videos_share_devices_before_tokens_do():
  eight = plan.choose(dataclasses.replace(FULL, batch=8), devices(8))
  assert eight.plan == Plan(devices=8)
  assert eight.fps == pytest.approx(8 * plan.choose(FULL, H200).fps)


def test_branches_of_guidance_share_devices():
  guided = dataclasses.replace(FULL, branches=2)
  found = plan.choose(guided, devices(4))
  assert found.plan.guidance_devices == 2 and found.plan.total == 4


def test_a_device_that_gains_nothing_is_left_alone():
  """Five devices: no fifth of 24 heads, so at most one of them can decode."""
  found = plan.choose(FULL, devices(5), {"decode_on": "same"})
  assert found.plan.sequence_devices == 4
  latents = dataclasses.replace(FULL, vae=None)
  assert plan.choose(latents, devices(5)).plan.total == 4


@pytest.mark.parametrize(
  ("memory", "precision", "kv_format"),
  [
    (40, "", ""), (28, "", "fp8"), (23.5, "", "nvfp4"), (20, "w8a16", "fp8"),
    (16, "w4a16", "nvfp4"),
  ],
)  # fmt: skip
def test_fewer_bits_only_where_nothing_else_fits(memory, precision, kv_format):
  """The cache first, then the weights, and of each the most bits that fit."""
  found = plan.choose(FULL, devices(memory=memory * GB))
  assert (found.plan.precision, found.plan.kv_format) == (precision, kv_format)
  assert found.peak <= plan.USABLE * memory * GB


def test_more_devices_come_before_fewer_bits():
  found = plan.choose(FULL, devices(4, memory=24 * GB))
  assert found.plan.precision == found.plan.kv_format == ""


def test_less_is_decoded_at_a_time_where_memory_is_short():
  plenty = plan.choose(FULL, devices(memory=80 * GB), decode_frames=8)
  short = plan.choose(FULL, devices(memory=32 * GB), decode_frames=8)
  assert plenty.plan.decode_frames == 8
  assert short.plan.decode_frames < 8 and short.plan.precision == ""


def test_what_is_fixed_stays():
  fixed = {"decode_on": "other", "kv_format": "nvfp4", "precision": "fp8"}
  found = plan.choose(FULL, devices(4), fixed)
  assert {name: getattr(found.plan, name) for name in fixed} == fixed
  assert found.plan.total <= 4


def test_the_choice_is_the_fastest_of_all():
  four = devices(4)
  best = plan.choose(FULL, four)
  for each in plan.layouts(FULL, four, {}, 1):
    if not plan.problem(FULL, four, each):
      assert plan.predict(FULL, four, each).fps <= best.fps * (1 + plan.WORTH)


# ------------------------------------------------------------------ refusals
@pytest.mark.parametrize(
  ("fixed", "message"),
  [
    ({"sequence_devices": 5}, r"sequence_devices=5 must divide the 24 heads; use one"),
    ({"devices": 3}, "devices=3 must divide the 1 videos"),
    ({"guidance_devices": 2}, "guidance_devices=2 needs guidance; use 1"),
    ({"sequence_devices": 12}, "sequence_devices=12 need 12 devices, but there are 8"),
    ({"decode_on": "moon"}, "decode_on='moon' is unknown; use 'same', 'other' or"),
    (
      {"decode_on": "split", "sequence_devices": 1},
      "decode_on='split' needs several devices; use 'same'",
    ),
  ],
)
def test_settings_that_are_impossible(fixed, message):
  with pytest.raises(ValueError, match=message):
    plan.choose(FULL, devices(8), fixed)


@pytest.mark.parametrize(
  ("count", "memory", "fixed", "message"),
  [
    (1, 24, {"precision": "", "kv_format": ""},
     r"needs 29\.\d GB a device, 6\.\d GB more .*; kv_format='nvfp4' would fit"),
    (1, 12, {}, r"needs 1\d\.\d GB a device, .* on 2 devices decode_on='other'"),
    (8, 3, {}, "use a smaller height and width"),
  ],
)  # fmt: skip
def test_what_does_not_fit_says_what_would(count, memory, fixed, message):
  with pytest.raises(ValueError, match=message):
    plan.choose(FULL, devices(count, memory * GB), fixed)


def test_a_report_that_is_none(tmp_path):
  with pytest.raises(ValueError, match=r"is no report of tools/bench_generate\.py"):
    hardware.measured_hardware(tmp_path / "none.json")
  (tmp_path / "other.json").write_text('{"hardware": {"kind": "x"}}')
  with pytest.raises(ValueError, match="is no report of"):
    hardware.measured_hardware(tmp_path / "other.json")


def test_a_report_gives_its_rates(tmp_path):
  path = tmp_path / "report.json"
  path.write_text(json.dumps({"hardware": dataclasses.asdict(H200)}))
  assert hardware.measured_hardware(path) == H200


def test_a_report_of_before_lacks_rates():
  found = hardware.measured_hardware(RESULTS / "bench_5b_h200_fp8.json")
  assert found.unrolled_share == found.denoise_share
  assert found.convolution_fp8 == found.convolution


def test_this_machine():
  found = hardware.this_machine()
  assert found.count == jax.device_count() and found.shared
  assert 1e8 < found.memory < 1e14


# ------------------------------------------------------------------ in a run
@pytest.fixture
def config():
  return {
    "plan": "auto", "devices": 1, "sequence_devices": 1, "guidance_devices": 1,
    "decode_on": "same", "precision": "", "kv_format": "", "decode_frames": 8,
    "decode_tiles": 1,
    "height": 704, "width": 1280, "frames_per_chunk": 8, "window_frames": 32,
    "steps": 4, "guidance": 1.0, "dtype": "bfloat16", "precision_plain_steps": (),
    "relative_rope": False,
  }  # fmt: skip


@pytest.fixture
def sources():
  choice = networks.Choice("ti2v-5b", "wan2.2", "umt5-xxl", "random")
  return networks.find_all(choice)


def small_gpu(monkeypatch, memory: float, count: int = 1):
  monkeypatch.setattr(hardware, "this_machine", lambda: devices(count, memory))


def test_a_run_is_planned(config, sources, monkeypatch):
  small_gpu(monkeypatch, 100 * GB)
  planned = planning.plan_run(config, sources, 1)
  assert planned.changes == {}
  assert planned.prediction.plan == Plan(decode_frames=8)
  small_gpu(monkeypatch, 18 * GB)
  planned = planning.plan_run(config, sources, 1)
  assert planned.changes.keys() == {"precision", "kv_format", "decode_frames"}
  assert planning.plan_run(config | {"plan": "off"}, sources, 1) is None
  told = planning.comparison(planned, 12.5)
  assert told["measured"]["fps"] == 12.5 and told["filled_in"] == planned.changes
  assert told["predicted"]["fps"] == planned.prediction.fps
  assert planning.comparison(None, 12.5) is None
  line = plan.describe(planned.prediction)
  assert f"predicted {planned.prediction.fps:.1f} FPS" in line and "kv_format=" in line


def test_a_run_has_what_was_asked_for(config, sources, monkeypatch):
  small_gpu(monkeypatch, 24 * GB)
  with pytest.raises(ValueError, match="kv_format='nvfp4' would fit"):
    planning.plan_run(config, sources, 1, ["kv_format", "precision"])
  with pytest.raises(ValueError, match="would fit"):  # as its saved state is
    planning.plan_run(config, sources, 1, resumed=True)
  given = config | {"kv_format": "nvfp4"}
  assert "kv_format" not in planning.plan_run(given, sources, 1).changes
  small_gpu(monkeypatch, 100 * GB, count=4)
  config |= {"decode_frames": 1}
  assert planning.plan_run(config, sources, 4).changes == {"devices": 4}
  assert planning.plan_run(config, sources, 4, ["devices"]).changes == {}
  assert planning.plan_run(config | {"devices": 2}, sources, 4).changes == {}


def test_a_run_takes_more_devices_before_fewer_bits(config, sources, monkeypatch):
  small_gpu(monkeypatch, 24 * GB, count=2)
  changes = planning.plan_run(config, sources, 1).changes
  assert changes.keys() <= {"sequence_devices", "decode_on", "decode_frames"}
  assert changes["sequence_devices"] == 2
  held = planning.plan_run(config, sources, 1, ["sequence_devices", "decode_on"])
  assert "kv_format" in held.changes and "sequence_devices" not in held.changes


def test_a_run_is_planned_with_measured_rates(config, sources, monkeypatch, tmp_path):
  small_gpu(monkeypatch, 100 * GB)
  slow = dataclasses.replace(H200, denoise_share=H200.denoise_share / 10, memory=1.0)
  path = tmp_path / "report.json"
  path.write_text(json.dumps({"hardware": dataclasses.asdict(slow)}))
  found = planning.plan_run(config | {"plan": str(path)}, sources, 1).prediction
  usual = planning.plan_run(config, sources, 1).prediction
  assert found.denoise_fps == pytest.approx(usual.denoise_fps / 10)
  assert found.hardware.memory == 100 * GB  # of this machine


def test_a_resumed_run_plans_its_layout_anew():
  config = {"devices": 4, "kv_format": "nvfp4", "steps": 4}
  saved = {"config": config, "planned": ["devices", "kv_format"]}
  kept = {"kv_format": "nvfp4", "steps": 4}
  assert planning.kept_settings(saved) == kept
  # Nor is a layout that was asked for: this machine may not have as many devices.
  assert planning.kept_settings({"config": config}) == kept


def test_planned_settings_are_those_of_the_config():
  from configs import generate

  config = generate.get_config("ti2v-5b")
  names = [field.name for field in dataclasses.fields(Plan)]
  assert config.plan == "auto" and set(planning.SETTINGS) <= set(names)
  assert all(name in config for name in names)
  # What changes numbers beyond rounding, and is not needed to fit, is the user's.
  assert set(names) - set(planning.SETTINGS) == {"attention_format", "exchange_format"}
