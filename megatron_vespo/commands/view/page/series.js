// The metrics of runs in the browser: fetched as they grow, put on one of three axes, smoothed, joined.

const NUMBERS = { Infinity, "-Infinity": -Infinity };
const UNITS = [[3 * 3600, 3600, "hours"], [180, 60, "minutes"], [0, 1, "seconds"]];

export const AXES = { step: "optimizer step", time: "wall time", tokens: "tokens trained on" };

// What is known of one run's metrics.jsonl.
export class RunData {
  constructor(id) {
    this.id = id;
    this.error = null; // one line, where the last request failed
    this.clear();
  }

  clear() {
    Object.assign(this, { generation: 0, records: 0, step: [], time: [], tokens: [], series: new Map() });
    Object.assign(this, { names: [], events: [], started: null, badLines: 0, asked: new Set() });
  }

  // Fetches what is new of the metrics `names`; whether anything has changed.
  async refresh(api, names, signal) {
    const more = names.some((name) => !this.asked.has(name));
    const from = more ? { generation: 0, from: 0 } : { generation: this.generation, from: this.records };
    let reply;
    try {
      reply = await api.get(`runs/${this.id}/curves`, { name: names, ...from }, signal);
    } catch (error) {
      if (signal?.aborted) throw error;
      const changed = this.error !== error.message;
      this.error = error.message;
      return changed;
    }
    const changed = this.error !== null || more || reply.generation !== this.generation
      || reply.records !== this.records || reply.events.length !== this.events.length;
    this.error = null;
    this.take(reply, names);
    return changed;
  }

  take(reply, names) {
    if (reply.from === 0) this.clear(); // all records: other metrics were asked for, or the file was cut
    this.asked = new Set(names);
    Object.assign(this, { generation: reply.generation, records: reply.records, names: reply.names });
    Object.assign(this, { events: reply.events, started: reply.started, badLines: reply.bad_lines });
    for (const axis of Object.keys(AXES)) this[axis] = this[axis].concat(reply[axis]);
    for (const [name, { at, value }] of Object.entries(reply.series)) {
      if (!this.series.has(name)) this.series.set(name, { at: [], value: [] });
      const known = this.series.get(name);
      known.at = known.at.concat(at);
      known.value = known.value.concat(value.map((one) => NUMBERS[one] ?? one));
    }
  }

  // [x, y] of a metric, x increasing; y is null where the value is not a finite number: a gap.
  curve(name, axis) {
    const series = this.series.get(name);
    if (!series) return [[], []];
    const points = series.at.map((index, i) => [this.place(this[axis][index], axis), series.value[i]]);
    if (axis === "time") points.sort((a, b) => a[0] - b[0]); // a clock may have been put back
    const xs = [], ys = [];
    for (const [x, y] of points) {
      if (xs.length && xs.at(-1) >= x) { // evaluated twice at a step: the last one counts
        ys[ys.length - 1] = Number.isFinite(y) ? y : null;
      } else {
        xs.push(x);
        ys.push(Number.isFinite(y) ? y : null);
      }
    }
    return [xs, ys];
  }

  // Where something is on an axis; times are seconds since the run began.
  place(value, axis) {
    return axis === "time" ? value - (this.started ?? this.time[0] ?? 0) : value;
  }

  seconds() {
    return this.time.length ? Math.max(...[this.time[0], this.time.at(-1)].map((t) => this.place(t, "time"))) : 0;
  }
}

// {divisor, name} of the time axis for so many seconds.
export function timeUnit(seconds) {
  const [, divisor, name] = UNITS.find(([least]) => seconds >= least);
  return { divisor, name };
}

// Exponential moving average with `weight` (0 to 1) of the past, without its pull to the first value:
// the average of k values is sum_i weight^(k-i) y_i / sum_i weight^(k-i). Gaps stay.
export function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, count = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + value;
    count = weight * count + 1;
    return sum / count;
  });
}

// Curves [[x, y], ...] over their common x: [x, y1, y2, ...]. null is a gap; undefined, a place that only other
// curves have, is drawn through.
export function joined(curves) {
  const xs = [...new Set(curves.flatMap(([x]) => x))].sort((a, b) => a - b);
  const place = new Map(xs.map((x, index) => [x, index]));
  return [xs, ...curves.map(([x, y]) => {
    const column = new Array(xs.length).fill(undefined);
    x.forEach((value, index) => { column[place.get(value)] = y[index]; });
    return column;
  })];
}
