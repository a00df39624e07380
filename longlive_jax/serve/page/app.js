// The page: players that watch sessions, and a form that tells the chosen one.
//
// A chunk is an MP4 of its own that knows its time in the video, so the video element's
// time is the video's time: looking back is seeking, and after a rewind the new chunks
// overwrite the old ones.
"use strict";

const $ = (id) => document.getElementById(id);
const players = [];
let chosen = null;

// ------------------------------------------------------------------ token, address
const address = new URLSearchParams(location.hash.slice(1));
if (address.has("token")) {
  sessionStorage.setItem("token", address.get("token"));
  address.delete("token"); // not to be copied with the address
  history.replaceState(null, "", "#" + address);
}
const token = () => sessionStorage.getItem("token") || "";

function remember() {
  const watched = players.map((p) => p.session).filter(Boolean);
  history.replaceState(null, "", watched.length ? "#watch=" + watched.join(",") : "#");
}

function say(text) {
  $("message").textContent = text;
}

async function ask(path) {
  const headers = token() ? { Authorization: "Bearer " + token() } : {};
  const answer = await fetch(path, { headers });
  if (answer.status === 401) $("entering").hidden = false;
  if (!answer.ok) {
    const why = await answer.json().catch(() => ({}));
    throw new Error(why.error || "the server answered " + answer.status);
  }
  return answer;
}

// ------------------------------------------------------------------ all of them
function choose(player) {
  chosen = player;
  for (const each of players) each.root.classList.toggle("chosen", each === player && players.length > 1);
  for (const id of ["change", "cut", "picture"]) $(id).disabled = !player;
}

async function add(hello) {
  while (players.length > 1) players[0].close();
  const player = new Player();
  players.push(player);
  $("players").append(player.root);
  choose(player);
  player.show();
  try {
    await player.open(hello);
  } catch (error) {
    player.close(error.message);
    throw error;
  }
  return player;
}

async function list() {
  const found = await (await ask("/sessions")).json();
  const select = $("sessions");
  const names = Object.keys(found);
  select.replaceChildren(new Option(names.length ? "open ..." : "none", ""));
  for (const name of names) {
    const text = found[name].prompt;
    select.add(new Option(`${name.slice(0, 4)} (${found[name].length}) ${text.slice(0, 40)}`, name));
  }
}

$("sessions").addEventListener("change", async (event) => {
  const session = event.target.value;
  if (!session || players.some((player) => player.session === session)) return;
  await add({ kind: "watch", session }).catch((error) => say(error.message));
});

$("telling").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = $("text").value.trim().replace(/\s+/g, " ");
  const kind = event.submitter?.value ?? (chosen ? "prompt" : "create");
  if (!text) return;
  try {
    if (kind === "create") {
      while (players.length) players[0].close();
      await add({ kind, text, seed: Number($("seed").value) || 0 });
      say("");
    } else {
      const recache = kind === "prompt" && $("recache").value;
      await chosen.send({ kind, text, ...(recache ? { recache } : {}) });
      chosen.livePressed();
      say(kind === "cut" ? "Cut: the next chunk starts a shot." : "The next chunk follows the new prompt.");
    }
  } catch (error) {
    say(error.message);
  }
});

// A picture: the next shot starts from it.
$("picture").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  const text = $("text").value.trim().replace(/\s+/g, " ");
  event.target.value = "";
  if (!file) return;
  if (!text) return say("Describe the shot first, then choose its picture.");
  if (file.size > 8 * 2 ** 20) return say("The picture is larger than 8 MB.");
  try {
    const bytes = new Uint8Array(await file.arrayBuffer());
    let binary = "";
    for (let i = 0; i < bytes.length; i += 32768) {
      binary += String.fromCharCode(...bytes.subarray(i, i + 32768));
    }
    await chosen.send({ kind: "image", text, image: btoa(binary) });
    say("The next chunk starts a shot from the picture.");
  } catch (error) {
    say(error.message);
  }
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  const button = !chosen ? $("start") : event.ctrlKey ? $("cut") : $("change");
  $("telling").requestSubmit(button);
});

$("entering").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value.trim());
  location.reload();
});

document.addEventListener("keydown", (event) => {
  const writing = /^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName);
  if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
  const pressing = event.target.tagName === "BUTTON" && event.key === " ";
  const act = {
    p: () => $("text").focus(),
    "/": () => $("text").focus(),
    " ": () => !pressing && chosen?.press("pause"),
    r: () => chosen?.press("rewind"),
    b: () => chosen?.press("branch"),
    l: () => chosen?.livePressed(),
    ArrowLeft: () => chosen?.step(-1),
    ArrowRight: () => chosen?.step(1),
  }[event.key.toLowerCase?.() in { p: 1, r: 1, b: 1, l: 1 } ? event.key.toLowerCase() : event.key];
  if (!act || pressing) return;
  event.preventDefault();
  act();
});

async function health() {
  let status = "unreachable";
  try {
    status = (await (await fetch("/health")).json()).status;
  } catch {}
  $("server").textContent = { ok: "ready", starting: "compiling, a moment" }[status] ?? status;
  $("server").className = { ok: "ok", starting: "" }[status] ?? "bad";
}

setInterval(health, 3000);
health();
list().catch((error) => say(error.message));
for (const session of (address.get("watch") ?? "").split(",").filter(Boolean)) {
  add({ kind: "watch", session }).catch((error) => say(error.message));
}
