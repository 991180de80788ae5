// The operator's page: asks the server how it does, every few seconds, and shows it as text.
"use strict";

const EVERY_MS = 5000;
const at = (id) => document.getElementById(id);
const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  sessionStorage.setItem("token", given);
  history.replaceState(null, "", location.pathname);
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleString();
const count = (number, one, many) => `${number} ${number === 1 ? one : many}`;

function ago(seconds) {
  if (seconds < 120) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

function fill(id, rows) {  // rows of cells, each a text or [text, class]
  const width = at(id).tHead.rows[0].cells.length;
  const lines = rows.length ? rows : [[["none", "quiet"]]];
  at(id).tBodies[0].replaceChildren(...lines.map((cells) => {
    const line = document.createElement("tr");
    for (const cell of cells) {
      const [text, kind] = Array.isArray(cell) ? cell : [cell, ""];
      const field = document.createElement("td");
      field.textContent = text;
      field.className = kind;
      if (!rows.length) field.colSpan = width;
      line.append(field);
    }
    return line;
  }));
}

function show(told) {
  const there = told.devices.filter((device) => device.connected).length;
  at("about").textContent = `${told.federation}, ${told.model}; runs since ${clock(told.since)}`;
  at("progress").max = told.agreed;
  at("progress").value = told.done;
  at("done").textContent = `${told.done} of ${count(told.agreed, "round is", "rounds are")} over; a round needs `
    + count(told.least, "release", "releases");
  fill("rounds", told.rounds.toReversed().map((round) => [
    round.round, clock(round.time), round.releases,
    Object.entries(round.refused).map(([code, number]) => `${number} ${code}`).join(", "), round.silent,
    round.aggregated ? ["aggregated", "good"] : ["not aggregated", "grave"]]));
  at("connected").textContent = `${there} of ${told.devices.length} connected`;
  fill("devices", told.devices.map((device) => [
    device.name, [device.key, "quiet"], device.connected ? ["connected", "good"] : ["away", "quiet"],
    device.heard ? ago(told.now - device.heard) : ["not since the start", "quiet"]]));
  at("door").textContent = `${count(told.connections, "connection", "connections")} now, ${told.unauthenticated} of `
    + "them without an admitted key";
  fill("refusals", Object.entries(told.turned_away).sort((a, b) => b[1] - a[1]));
}

async function look() {
  let wrong = "";
  try {
    const token = sessionStorage.getItem("token") || "";
    const answer = await fetch("/api/status", { headers: { authorization: `Bearer ${token}` } });
    const told = await answer.json();
    if (answer.ok) show(told); else wrong = told.error;
  } catch {
    wrong = "the server does not answer: it has ended, or all rounds are done";
  }
  at("error").textContent = wrong;
  at("error").hidden = !wrong;
  setTimeout(look, EVERY_MS);
}

look();
