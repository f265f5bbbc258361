// What the tabs Responses and Distributions share: links that keep the rest of the hash, signed numbers.

import { number } from "./dom.js";

// The hash of `tab` with the present parameters and `changes`; null removes one.
export function linkTo(tab, changes) {
  const params = new URLSearchParams(location.hash.split("?")[1] ?? "");
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === undefined || value === "") params.delete(name);
    else params.set(name, value);
  }
  return `#${tab}?${params}`;
}

// A number whose sign matters, with a real minus sign.
export function signed(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  const text = number(Math.abs(value), digits);
  return value < 0 ? `−${text}` : value > 0 ? `+${text}` : text;
}

// The value of a colour of style.css, for canvases.
export function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
