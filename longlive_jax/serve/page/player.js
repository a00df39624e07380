// One session: its connection, its chunks, its picture and timeline.
"use strict";

class Player {
  constructor() {
    this.root = $("player").content.firstElementChild.cloneNode(true);
    this.find = (what) => this.root.querySelector(what);
    this.video = this.find("video");
    this.screen = new Screen(this.video);
    this.chunks = [];
    this.status = {};
    this.fps = 24;
    this.picked = null; // chunk that was chosen on the timeline
    this.waiting = []; // chunk events whose media comes next
    this.fetching = new Set();
    this.answers = new Map();
    this.number = 0;
    this.root.addEventListener("focusin", () => choose(this));
    this.root.addEventListener("pointerdown", () => choose(this));
    for (const button of this.root.querySelectorAll("[data-do]")) {
      button.addEventListener("click", () => this.press(button.dataset.do, button));
    }
    const line = this.find(".timeline");
    line.addEventListener("click", (e) => {
      const cell = e.target.closest("i");
      if (cell) this.look(Number(cell.dataset.chunk));
    });
    line.addEventListener("keydown", (e) => {
      const jump = { Home: -1e9, End: 1e9, PageUp: -10, PageDown: 10 }[e.key];
      if (jump) this.step(jump, e);
    });
    this.video.addEventListener("click", () => this.video.play());
    this.timer = setInterval(() => this.keepUp(), 200);
  }

  // Opens the connection; `hello` is the first message.
  open(hello) {
    const protocols = ["longlive", ...(token() ? ["bearer." + token()] : [])];
    const where = location.origin.replace(/^http/, "ws") + "/socket";
    const socket = (this.socket = new WebSocket(where, protocols));
    socket.binaryType = "arraybuffer";
    this.began = performance.now();
    this.screen.first = () => this.firstSeen();
    const done = new Promise((resolve, reject) => {
      socket.onopen = () => this.send(hello).then(resolve, reject);
      socket.onclose = () => {
        const gone = new Error("the server closed the connection");
        reject(gone);
        if (this.socket !== socket) return;
        for (const answer of this.answers.values()) answer.reject(gone);
        this.answers.clear();
        setTimeout(() => this.reopen(), 1000);
      };
    });
    socket.onmessage = (message) => this.hear(message.data);
    return done;
  }

  reopen() {
    if (this.closed || !this.session) return;
    this.open({ kind: "watch", session: this.session }).catch(() => {});
  }

  send(message) {
    const request = ++this.number;
    if (!this.socket || this.socket.readyState !== WebSocket.OPEN) {
      return Promise.reject(new Error("not connected to the server"));
    }
    this.socket.send(JSON.stringify({ ...message, request }));
    return new Promise((resolve, reject) => {
      this.answers.set(request, { resolve, reject });
    });
  }

  hear(data) {
    if (typeof data !== "string") {
      const chunk = this.waiting.shift();
      if (chunk && this.chunks[chunk.index] === chunk) this.screen.append(data);
      return;
    }
    const news = JSON.parse(data);
    const act = {
      done: () => this.answer(news)?.resolve(news),
      error: () => {
        const answer = this.answer(news);
        if (answer) answer.reject(new Error(news.message));
        else say(news.message);
      },
      state: () => this.begin(news),
      status: () => Object.assign(this.status, news),
      chunk: () => this.add(news),
      rewound: () => this.rewound(news.chunk),
      problem: () => say(news.message),
      ended: () => this.close("The session was deleted."),
    }[news.event];
    if (act) act();
    this.show();
  }

  answer(news) {
    const answer = this.answers.get(news.request);
    this.answers.delete(news.request);
    return answer;
  }

  // ---------------------------------------------------------------- what is heard
  begin(state) {
    const again = this.session === state.session && this.chunks.length;
    this.session = state.session;
    this.fps = state.fps;
    const before = this.chunks;
    this.chunks = state.chunks;
    this.status = state;
    this.waiting = [];
    this.find(".screen").classList.toggle("wide", state.width > 1.2 * state.height);
    let same = 0; // chunks that are what they were
    while (same < before.length && before[same].media === this.chunks[same]?.media) same++;
    if (again && same < before.length) this.rewound(same, true);
    if (!again) this.start = this.time(Math.max(0, this.chunks.length - 1));
    remember();
    list();
  }

  add(news) {
    const chunk = news.chunk;
    this.chunks[chunk.index] = chunk;
    this.made = news;
    if (!news.media) return;
    this.waiting.push(chunk);
    this.screen.start(news.codec);
  }

  rewound(chunk, whole = false) {
    const time = this.time(chunk);
    if (!whole) this.chunks.length = Math.min(chunk, this.chunks.length);
    this.screen.forget(Math.max(0, time - 0.001));
    if (this.video.currentTime > time) this.video.currentTime = Math.max(0, time - 0.5);
    this.picked = null;
  }

  firstSeen() {
    this.find(".first").textContent =
      ((performance.now() - this.began) / 1000).toFixed(1) + " s";
  }

  // ---------------------------------------------------------------- time
  time(chunk) {
    if (chunk < this.chunks.length) return this.chunks[chunk].first_frame / this.fps;
    const last = this.chunks[this.chunks.length - 1];
    return last ? (last.first_frame + last.frames) / this.fps : 0;
  }

  at(time) {
    for (let i = this.chunks.length - 1; i > 0; i--) {
      if (this.time(i) <= time + 0.001) return i;
    }
    return 0;
  }

  // Fetches what is about to be played and is not there; crosses holes.
  keepUp() {
    if (this.start !== undefined && this.screen.buffer) {
      if (this.start) this.video.currentTime = this.start;
      this.start = undefined;
    }
    if (!this.chunks.length || !this.screen.buffer) return;
    const time = this.video.currentTime;
    const now = this.at(time);
    for (const index of [now, now + 1]) this.fetch(index);
    const chunk = this.chunks[now];
    if (!chunk.media && now + 1 < this.chunks.length) {
      this.video.currentTime = this.time(now + 1);
    }
    const live = time >= this.time(this.chunks.length) - 0.05;
    this.find(".screen").classList.toggle("waits", live);
    this.show();
  }

  async fetch(index) {
    const chunk = this.chunks[index];
    if (!chunk?.media || this.fetching.has(chunk.media)) return;
    if (this.screen.has(this.time(index)) || this.waiting.includes(chunk)) return;
    this.fetching.add(chunk.media);
    try {
      const path = `/sessions/${this.session}/chunks/${chunk.media}`;
      const bytes = await (await ask(path)).arrayBuffer();
      if (this.chunks[index] === chunk) this.screen.append(bytes);
    } catch (error) {
      say(error.message);
    } finally {
      setTimeout(() => this.fetching.delete(chunk.media), 1000);
    }
  }

  look(chunk) {
    this.picked = chunk;
    this.video.currentTime = this.time(chunk) + 0.01;
    this.video.play().catch(() => {});
    this.show();
  }

  step(by, event) {
    event?.preventDefault();
    const from = this.picked ?? this.at(this.video.currentTime);
    const last = this.chunks.length - 1;
    if (last >= 0) this.look(Math.min(last, Math.max(0, from + by)));
  }

  // ---------------------------------------------------------------- what is pressed
  async press(what, button) {
    try {
      if (what.includes(".")) await this.download(what);
      else await this[what + "Pressed"](button);
    } catch (error) {
      say(error.message);
    }
  }

  async pausePressed() {
    await this.send({ kind: this.status.paused ? "resume" : "pause" });
  }

  async rewindPressed() {
    if (this.picked === null) return say("Choose a chunk on the timeline first.");
    const chunk = this.picked;
    await this.send({ kind: "rewind", chunk });
    say(`Back at chunk ${chunk}: what comes is made anew.`);
  }

  async branchPressed() {
    const chunk = this.picked === null ? {} : { chunk: this.picked };
    const { session } = await this.send({ kind: "branch", ...chunk });
    const other = players.find((player) => player !== this);
    if (other) other.close();
    await add({ kind: "watch", session });
    say("The branch is beside it: tell it something else, and compare.");
  }

  livePressed() {
    this.picked = null;
    this.video.currentTime = this.time(Math.max(0, this.chunks.length - 1));
    this.video.play().catch(() => {});
  }

  async savePressed() {
    const { saved } = await this.send({ kind: "save" });
    say(`Saved after chunk ${saved}.`);
  }

  closePressed() {
    this.close();
  }

  async endPressed(button) {
    if (button.textContent === "Delete") {
      button.textContent = "Really delete?";
      setTimeout(() => (button.textContent = "Delete"), 4000);
    } else await this.send({ kind: "end" });
  }

  async download(file) {
    say("Preparing " + file + " ...");
    const blob = await (await ask(`/sessions/${this.session}/${file}`)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${this.session}-${file}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say("");
  }

  close(why = "") {
    if (this.closed) return;
    this.closed = true;
    clearInterval(this.timer);
    this.socket?.close();
    this.root.remove();
    players.splice(players.indexOf(this), 1);
    choose(players[0] ?? null);
    remember();
    list();
    say(why);
  }

  // ---------------------------------------------------------------- what is shown
  show() {
    const { status, chunks } = this;
    const now = this.at(this.video.currentTime);
    this.find(".caption").textContent = chunks[now]?.made.prompt ?? status.prompt ?? "";
    const badge = this.find(".badge");
    const waits = !chunks.length && "making the first frames";
    badge.textContent = status.error || (status.paused && "paused") || waits || "";
    badge.hidden = !badge.textContent;
    const pause = this.find("[data-do=pause]");
    pause.textContent = status.paused ? "Resume" : "Pause";
    pause.setAttribute("aria-pressed", String(Boolean(status.paused)));
    const reachable = this.picked !== null && this.picked >= (status.oldest ?? 0);
    this.find("[data-do=rewind]").disabled = !reachable;
    this.find("[data-do=branch]").disabled = !chunks.length || (this.picked !== null && !reachable);
    this.drawTimeline(now);
    if (this.made) this.drawNumbers();
  }

  drawTimeline(now) {
    const line = this.find(".timeline");
    while (line.children.length > this.chunks.length) line.lastChild.remove();
    this.chunks.forEach((chunk, i) => {
      const cell = line.children[i] ?? line.appendChild(document.createElement("i"));
      const { made } = chunk;
      const told = made.recache || (i && !made.cut && made.prompt !== this.chunks[i - 1].made.prompt);
      cell.dataset.chunk = i;
      cell.className = [
        made.shot % 2 && "odd", made.cut && "cut", told && "told",
        i < (this.status.oldest ?? 0) && "old", !chunk.media && "lost",
        i === now && "now", i === this.picked && "chosen",
      ].filter(Boolean).join(" ");
      cell.title = `chunk ${i}, shot ${made.shot}: ${made.prompt}`;
    });
    const value = this.picked ?? now;
    const made = this.chunks[value]?.made;
    line.setAttribute("aria-valuemax", Math.max(0, this.chunks.length - 1));
    line.setAttribute("aria-valuenow", value);
    line.setAttribute("aria-valuetext", made ? `chunk ${value}, shot ${made.shot}: ${made.prompt}` : "empty");
    if (this.picked === null && line.lastChild) line.scrollLeft = line.scrollWidth;
  }

  drawNumbers() {
    const { made, chunks } = this;
    const last = chunks[chunks.length - 1];
    if (!last) return;
    this.find(".fps").textContent = made.made_fps.toFixed(1);
    this.find(".latency").textContent = last.seconds.toFixed(2) + " s";
    const bytes = made.memory.device ?? made.memory.process;
    this.find(".memory").textContent = (bytes / 2 ** 30).toFixed(2) + " GiB";
    const seen = chunks.slice(-60);
    const spread = seen.map((chunk) => chunk.std / chunks[0].std);
    const x = (i) => (seen.length > 1 ? (200 * i) / (seen.length - 1) : 0);
    const draw = (name, values, y) =>
      this.find(`polyline.${name}`).setAttribute(
        "points", values.map((v, i) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" "));
    draw("sink", seen.map((chunk) => chunk.sink), (v) => 36 - 32 * Math.max(0, v));
    draw("spread", spread, (v) => 36 - 32 * Math.max(0, 1 - Math.abs(v - 1)));
    this.find("span.sink").textContent = "likeness to the sink " + last.sink.toFixed(2);
    this.find("span.spread").textContent = "spread " + spread.at(-1).toFixed(2) + " of the first";
  }
}
