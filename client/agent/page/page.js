"use strict";
const at = (id) => document.getElementById(id);
const token = handedOver();
let conversation = fresh();

/* In the address' fragment, which is not sent; kept for this tab and this port alone. */
function handedOver() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", "/");
  }
  return sessionStorage.getItem("token") ?? "";
}
addEventListener("hashchange", () => { if (location.hash.startsWith("#token=")) location.reload(); });

function send(path, told = {}) {
  const headers = { authorization: `Bearer ${token}`, "content-type": "application/json" };
  return fetch(`/api/${path}`, { ...told, headers }).catch(() => { throw new Error("the agent does not answer"); });
}

function fresh() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (b) => b.toString(16).padStart(2, "0")).join("");
}

function made(tag, text = "", attributes = {}) {
  const element = Object.assign(document.createElement(tag), attributes);
  element.textContent = text;
  return element;
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
  if (text) at("error").scrollIntoView({ block: "center" });
}

async function ask(path, body) {
  const response = await send(path, body === undefined ? {} : { method: "POST", body: JSON.stringify(body) });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function follow(path, body, tell) {
  const response = await send(path, { method: "POST", body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", part = await reader.read(); !part.done; part = await reader.read()) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const told = JSON.parse(line);
      if (told.error) throw new Error(told.error);
      if ("done" in told) return told.done;
      tell(told);
    }
  }
  throw new Error("the agent stopped in the middle");
}

function on(element, event, work) {
  element.addEventListener(event, async (happened) => {
    happened.preventDefault();
    complain("");
    if (element.tagName === "BUTTON") element.disabled = true;
    try { await work(happened); } catch (error) { complain(error.message); } finally { element.disabled = false; }
  });
}

// -- looks -----------------------------------------------------------------------------------------------------------

function look(theme) {
  if (theme) document.documentElement.dataset.theme = theme; else delete document.documentElement.dataset.theme;
  at("theme").value = theme;
}
look(localStorage.getItem("theme") ?? "");
at("theme").addEventListener("change", () => { localStorage.setItem("theme", at("theme").value); look(at("theme").value); });

// -- talking ---------------------------------------------------------------------------------------------------------

function shownTurn(prompt, reply = "…") {
  const box = made("div", "", { className: at("temporary").checked ? "turn temporary" : "turn" });
  const said = made("div", reply, { className: "said" });
  box.append(made("p", prompt, { className: "you" }), said);
  at("turns").append(box);
  return { box, said };
}

function spoken(box, turn) {
  box.querySelector(".said").replaceChildren(turn.said ? markdown(turn.said) : "(nothing)");
  if (turn.id) judged(box, turn);
}

function judged(box, turn) {
  const up = made("button", "👍 A good reply", { type: "button" });
  const down = made("button", "👎 Not a good reply", { type: "button" });
  up.setAttribute("aria-label", "a good reply");  // without the picture
  down.setAttribute("aria-label", "not a good reply");
  const wanted = made("textarea", "", { rows: 2, value: turn.wanted });
  wanted.setAttribute("aria-label", "what you would have said");
  const keep = made("button", "This is what I would have said", { type: "button" });
  const show = () => {
    up.setAttribute("aria-pressed", turn.liked === 1 || turn.liked === true);
    down.setAttribute("aria-pressed", turn.liked === 0 || turn.liked === false);
  };
  const rate = async (liked, text) => { Object.assign(turn, await ask("rate", { id: turn.id, liked, wanted: text })); show(); await refresh(); };
  on(up, "click", () => rate(true, turn.wanted));
  on(down, "click", () => rate(false, turn.wanted));
  on(keep, "click", () => rate(turn.liked === null ? null : Boolean(turn.liked), wanted.value));
  show();
  box.append(up, down, wanted, keep);
}

function because(one) {
  const day = new Date(1000 * one.time).toLocaleDateString(undefined, { day: "numeric", month: "long" });
  return made("p", `because you said on ${day}: “${one.words.slice(0, 200)}”`, { className: "note because" });
}

let before = [];  // lines of a temporary chat, which are here alone

on(at("chat"), "submit", async () => {
  const prompt = at("prompt").value, temporary = at("temporary").checked;
  const { box, said } = shownTurn(prompt);
  at("prompt").value = "";
  try {
    const asked = temporary ? { prompt, temporary, before } : { prompt, conversation };
    const turn = await follow("chat", asked, (told) => {
      if (told.recalled) box.append(...told.recalled.map(because)); else said.replaceChildren(markdown(told.text));
    });
    spoken(box, turn);
    if (temporary) before = [...before, prompt, turn.said].filter(Boolean).slice(-64);
  } catch (error) { box.remove(); at("prompt").value = prompt; throw error; }
  if (!temporary) { sessionStorage.setItem("conversation", conversation); await showConversations(); }
  await refresh();
});
on(at("temporary"), "change", async () => begin(fresh()));

at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("chat").requestSubmit(); }
});
on(at("anew"), "click", async () => { begin(fresh()); at("prompt").focus(); });

function begin(name) {
  conversation = name;
  before = [];
  at("turns").replaceChildren();
  sessionStorage.removeItem("conversation");
}

// -- earlier conversations -------------------------------------------------------------------------------------------

let listed = [];

async function showConversations(older = false) {
  const search = at("search").value.trim();
  const found = await ask("conversations", { search, before: older && listed.length ? listed.at(-1).last : 0 });
  listed = older ? [...listed, ...found.conversations] : found.conversations;
  at("conversations").replaceChildren(...listed.map((one) => {
    const entry = made("li"), open = made("button", "", { type: "button" });
    open.append(`${one.prompt.slice(0, 80)} `, made("small", `${new Date(1000 * one.time).toLocaleString()} · ${plural(one.turns, "turn", "turns")}`));
    on(open, "click", async () => { await reopen(one.name); at("prompt").focus(); });
    entry.append(open);
    return entry;
  }));
  at("found").textContent = listed.length ? "" : search ? "nothing was said with these words" : "nothing was said yet";
  at("more-conversations").hidden = !found.more;
}
on(at("search-form"), "submit", () => showConversations());
on(at("more-conversations"), "click", () => showConversations(true));

async function reopen(name) {
  const turns = await ask("conversation", { name });
  at("temporary").checked = false;
  begin(name);
  for (const turn of turns) {
    const { box } = shownTurn(turn.prompt, "");
    spoken(box, turn);
  }
  if (turns.length) sessionStorage.setItem("conversation", name);
}

// -- what is kept ----------------------------------------------------------------------------------------------------

const PAGE = 10;
let items = [], first = 0;

async function showKept() {
  items = await ask("kept");
  showItems(first);
}

function showItems(from) {
  first = Math.max(0, Math.min(from, PAGE * Math.floor(Math.max(0, items.length - 1) / PAGE)));
  const some = items.slice(first, first + PAGE);
  at("items").replaceChildren(...some.map((item) => {
    const entry = made("li");
    const scores = Object.entries(item.scores).map(([name, value]) => `${name.toUpperCase()} ${value.toFixed(2)}`).join(" · ");
    const drop = made("button", "Erase", { type: "button", className: "grave" });
    drop.setAttribute("aria-label", `Erase: ${item.prompt.slice(0, 60)}`);
    on(drop, "click", () => erase([item.id]));
    const none = item.held_back ? "→ held back, to try what is learned" : "→ no reply of yours yet";
    entry.append(
      made("p", item.prompt, { className: "you" }),
      made("p", item.reply ? `→ ${item.reply}` : none, { className: "said" }),
      made("p", `in the ${item.in.join(" and the ")}${item.domain ? ` · ${item.domain}` : ""}${scores ? ` · ${scores}` : ""} · ${item.made.length} made from it`, { className: "scores" }),
      drop,
    );
    return entry;
  }));
  if (!items.length) at("items").append(made("li", "nothing yet"));
  at("items-place").textContent = items.length > PAGE ? `${first + 1} to ${first + some.length} of ${items.length}` : "";
  at("items-before").hidden = first === 0;
  at("items-after").hidden = first + PAGE >= items.length;
}
on(at("items-before"), "click", async () => showItems(first - PAGE));
on(at("items-after"), "click", async () => showItems(first + PAGE));

async function erase(ids) {
  const under = await ask("said-under", { ids });
  const answer = under.length ? await decided(under) : "erase";
  if (!answer) return;
  const asked = { ids, keep_replies: answer === "keep" };
  const done = await follow("erase", asked, (told) => { at("progress").textContent = `erasing: ${told.phase}`; });
  const sent = done.sent;
  const replies = done.replies ? `, with ${plural(done.replies, "reply", "replies")} of the model` : "";
  await showConversations();
  at("progress").textContent = `erased${replies}; ${done.dialogues} dialogues left${done.retrained ? ", the adapter is trained anew" : ""}${sent ? `; ${sent} releases were sent before and cannot be recalled` : ""}`;
  await refresh();
}

/* "erase", "keep", or nothing: what becomes of the replies that may hold what is erased. */
function decided(under) {
  const box = at("under");
  at("under-count").textContent = `${plural(under.length, "reply", "replies")} of the model may hold what is erased: given since it learned from it, or with it in sight. What you wrote there stays.`;
  at("under-replies").replaceChildren(...under.map((turn) => {
    const entry = made("li");
    entry.append(made("p", turn.prompt, { className: "you" }), made("p", turn.said, { className: "said" }));
    return entry;
  }));
  box.returnValue = "";
  box.showModal();
  return new Promise((resolve) => box.addEventListener("close", () => resolve(box.returnValue), { once: true }));
}
for (const answer of ["none", "keep", "erase"]) {
  at(`under-${answer}`).addEventListener("click", () => at("under").close(answer === "none" ? "" : answer));
}

function plural(count, one, many) { return `${count} ${count === 1 ? one : many}`; }

// -- profile ---------------------------------------------------------------------------------------------------------

let profile = { interests: [], interactions: 0 };

async function showProfile() {
  profile = await ask("profile");
  at("interests").replaceChildren(...profile.interests.map((interest, i) => {
    const entry = made("li");
    const text = made("input", "", { type: "text", value: interest.text, maxLength: 80 });
    text.setAttribute("aria-label", `interest ${i + 1}`);
    text.dataset.place = i;
    const drop = made("button", "Remove", { type: "button" });
    on(drop, "click", async () => { entry.remove(); });
    entry.append(text, made("p", `came up ${interest.count} times · liked ${(100 * interest.feedback).toFixed(0)} %`, { className: "scores" }), drop);
    return entry;
  }));
  if (!profile.interests.length) at("interests").append(made("li", "nothing yet"));
}

on(at("profile-form"), "submit", async () => {
  const texts = [...at("interests").querySelectorAll("input")];
  const interests = texts.map((text) => ({ ...profile.interests[text.dataset.place], text: text.value }));
  await ask("profile", { ...profile, interests });
  await showProfile();
});

// -- learning --------------------------------------------------------------------------------------------------------

on(at("learn"), "click", async () => {
  const page = await follow("learn", {}, (told) => { at("progress").textContent = `learning: ${told.phase}`; });
  at("progress").textContent = `learned from ${page.personal_examples} examples in ${page["seconds of all"].toFixed(1)} s`;
  await refresh();
});
on(at("go-back"), "click", async () => {
  if (!confirm("Use the adapter from before the last learning? What you said stays.")) return;
  await ask("go-back", {});
  at("progress").textContent = "the adapter before the last learning is used";
  await refresh();
});

function tried(trial) {
  if (!trial) return "Nothing was learned yet.";
  const decided = trial.decision === "untried" ? "kept, untried: no reply of yours was held back" : trial.decision;
  if (trial.before === null) return `The last learning was ${decided}.`;
  return `The last learning was ${decided}. On ${plural(trial.replies, "reply", "replies")} of yours that were held back, ${trial.before.toFixed(3)} nats a token before and ${trial.after.toFixed(3)} after; lower is more like you.`;
}

function met(shared) {
  if (!shared) return "";
  const figures = shared.after === null ? "" : ` On ${plural(shared.replies, "reply", "replies")} of yours, ${shared.before.toFixed(3)} nats a token without it and ${shared.after.toFixed(3)} with it.`;
  const less = shared.decision === "refused" ? ", and you go on with the one before" : "";
  return `The last shared adapter of ${shared.federation} (${shared.version}): ${shared.decision}${less}.${figures}`;
}

async function showTrials() {
  const { trials, shared, shown, held_back: held, can_go_back: can } = await ask("trials");
  at("shared-trial").textContent = met(shared.at(-1));
  at("trial").textContent = `${tried(trials.at(-1))} ${plural(held, "reply", "replies")} of yours ${held === 1 ? "is" : "are"} held back now.`;
  at("go-back").hidden = !can;
  at("shown").replaceChildren(...shown.map((one) => {
    const entry = made("li"), compared = made("div", "", { className: "compared" });
    for (const [name, text, nll] of [["before", one.said_before, one.nll_before], ["after", one.said_after, one.nll_after]]) {
      const box = made("div");
      box.append(made("b", `${name}: your reply at ${nll.toFixed(3)}`), made("span", text || "(nothing)"));
      compared.append(box);
    }
    const own = made("div");
    own.append(made("b", "what you wrote"), made("span", one.wanted));
    compared.append(own);
    entry.append(made("p", one.prompt, { className: "you" }), compared);
    return entry;
  }));
  const tests = trials.filter((trial) => trial.after !== null);
  const points = tests.map((trial) => ({
    x: trial.number, y: trial.after, from: trial.before, kind: ["kept", "untried"].includes(trial.decision) ? "" : "bad",
    told: `learning ${trial.number}: ${trial.before.toFixed(3)} before, ${trial.after.toFixed(3)} after, ${trial.decision}`,
  }));
  chart(at("learning-chart"), `Held-back replies before and after ${plural(tests.length, "learning", "learnings")}, nats a token`, points, { unit: "nats a token, learning by learning", line: false });
  at("learning-note").hidden = !tests.length;
}
for (const choice of document.querySelectorAll("input[name=when]")) {
  on(choice, "change", async () => { await ask("learns", { when: choice.value }); });
}

async function showConsents() {
  const consents = await ask("consents");
  const legend = at("consents").querySelector("legend");
  at("consents").replaceChildren(legend, ...Object.entries(consents).map(([item, { text, given }]) => {
    const label = made("label");
    const box = made("input", "", { type: "checkbox", checked: given });
    on(box, "change", async () => { await ask("consent", { item, given: box.checked }); await refresh(); });
    label.append(box, ` ${text}`);
    return label;
  }));
}

// -- what has left ---------------------------------------------------------------------------------------------------

async function showLeft(status) {
  const [ledger, sent] = await Promise.all([ask("ledger"), ask("sent")]);
  const spent = ledger.spent === null ? "the account is broken; nothing is released" : `ε ${ledger.spent.toFixed(3)} of ${ledger.budget} is spent`;
  at("budget").textContent = `${spent} (δ = ${ledger.delta}, for ${ledger.unit}; ${ledger.trust}).`;
  at("spent").max = ledger.budget;
  at("spent").value = ledger.spent ?? ledger.budget;
  at("sent").replaceChildren(...sent.map((row) => {
    const line = made("tr");
    const cells = [new Date(1000 * row.time).toLocaleString(), row.federation, row.round, row.kind, row.bytes, row.epsilon?.toFixed(3) ?? ""];
    line.append(...cells.map((cell) => made("td", String(cell))));
    return line;
  }));
  const releases = sent.filter((row) => row.kind === "release");
  const told = (row) => `round ${row.round} of ${row.federation}: ${row.bytes} bytes, ε ${row.epsilon?.toFixed(3) ?? "?"}`;
  chart(at("spent-chart"), `ε after each release, of ${ledger.budget}`, releases.filter((row) => row.epsilon !== null).map((row, x) => ({ x, y: row.epsilon, told: told(row) })), { unit: "ε, release by release", least: 0, most: ledger.budget });
  chart(at("bytes-chart"), "Bytes of each release", releases.map((row, x) => ({ x, y: row.bytes, told: told(row) })), { unit: "bytes, release by release", line: false, bars: true, least: 0 });
  at("federation").textContent = status.federation ? `Joined ${status.federation.name} at ${status.federation.server}.` : "This device is in no federation.";
  for (const [what, count] of Object.entries(status["turned away"])) at("federation").textContent += ` Turned away since the start: ${count} × ${what}.`;
  at("leave").hidden = !status.federation;
}
on(at("leave"), "click", async () => {
  if (confirm("Leave the federation? What was sent cannot be taken back.")) { await ask("leave", {}); await refresh(); }
});

async function showTokens() {
  const tokens = await ask("tokens");
  at("tokens").replaceChildren(...tokens.map((token) => {
    const entry = made("li", `${token.name}, since ${new Date(1000 * token.made).toLocaleString()} `);
    const revoke = made("button", "Revoke", { type: "button", className: "grave" });
    revoke.setAttribute("aria-label", `Revoke the token of ${token.name}`);
    on(revoke, "click", async () => { await ask("token-revoke", { name: token.name }); await showTokens(); });
    entry.append(revoke);
    return entry;
  }));
  if (!tokens.length) at("tokens").append(made("li", "none"));
}

on(at("export"), "click", async () => {
  const response = await send("export");
  if (!response.ok) throw new Error((await response.json()).error);
  const address = URL.createObjectURL(await response.blob());
  made("a", "", { href: address, download: "florilegium-device.zip" }).click();
  URL.revokeObjectURL(address);
});

on(at("erase-all"), "click", async () => {
  if (!confirm("Erase all dialogues, and what was learned from them?")) return;
  await erase((await ask("dialogues")).map((turn) => turn.id));
  begin(fresh());
});

async function refresh() {
  const status = await ask("status");
  at("about").textContent = `${status.device} · ${status.model} · ${status.dialogues} dialogues, ${status.new} new · ${status.unanswered} without a reply of yours`;
  for (const choice of document.querySelectorAll("input[name=when]")) choice.checked = choice.value === status.learns;
  await Promise.all([showKept(), showProfile(), showConsents(), showLeft(status), showTrials(), showTokens()]);
}

async function come() {
  await refresh();
  await showConversations();
  const last = sessionStorage.getItem("conversation");
  if (last) await reopen(last);
}
come().catch((error) => complain(error.message));
