// Feeds a video element through a MediaSource, one operation after the other.
"use strict";

class Screen {
  constructor(video) {
    this.video = video;
    this.todo = [];
    this.buffer = null;
    this.first = null; // called when the first frame is seen
  }

  start(codec) {
    if (this.source) return;
    const type = `video/mp4; codecs="${codec}"`;
    if (!window.MediaSource || !MediaSource.isTypeSupported(type)) {
      say("This browser cannot play H.264 while it is made: " + type);
      return;
    }
    this.source = new MediaSource();
    this.video.src = URL.createObjectURL(this.source);
    this.source.addEventListener("sourceopen", () => {
      this.buffer = this.source.addSourceBuffer(type);
      this.buffer.addEventListener("updateend", () => this.next());
      this.next();
    }, { once: true });
    this.video.requestVideoFrameCallback?.(() => this.first && this.first());
    this.video.play().catch(() => {}); // asked for again by a click on the video
  }

  append(bytes) {
    this.todo.push((buffer) => buffer.appendBuffer(bytes));
    this.next();
  }

  forget(from) {
    this.todo = [() => this.buffer.remove(from, Infinity)];
    this.next();
  }

  next() {
    if (!this.buffer || this.buffer.updating || !this.todo.length) return;
    try {
      this.todo[0](this.buffer);
      this.todo.shift();
    } catch (error) {
      const old = this.video.currentTime - 10;
      if (error.name === "QuotaExceededError" && old > 0) this.buffer.remove(0, old);
      else this.todo.shift();
    }
  }

  has(time) {
    const ranges = this.video.buffered;
    for (let i = 0; i < ranges.length; i++) {
      if (ranges.start(i) <= time + 0.02 && time + 0.02 < ranges.end(i)) return true;
    }
    return false;
  }
}
