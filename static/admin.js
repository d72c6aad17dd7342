// What htmx does not do by itself: local times, polling that stops when nobody looks, the notice when
// the server is away, confirmations, notes that go. Every page works in its essentials without this.
(() => {
  // Times: written in UTC by the server, shown in the zone that was chosen here, else in the
  // browser's; UTC stays in the tooltip.
  const OWN_ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone;
  const zoneChosen = () => {
    try {
      // Throws for a zone that this browser does not know.
      const timeZone = localStorage.getItem("zone") || OWN_ZONE;
      return new Intl.DateTimeFormat(undefined, { timeZone }).resolvedOptions().timeZone;
    } catch {
      return OWN_ZONE;
    }
  };
  let zone;
  let clock;
  let isoClock;
  const useZone = () => {
    const two = "2-digit";
    zone = zoneChosen();
    clock = new Intl.DateTimeFormat(undefined, {
      year: "numeric",
      month: "short",
      day: "numeric",
      hour: two,
      minute: two,
      second: two,
      timeZone: zone,
      timeZoneName: zone === OWN_ZONE ? undefined : "short",
    });
    // Swedes write 2026-11-25 22:00:00.
    isoClock = new Intl.DateTimeFormat("sv-SE", {
      year: "numeric",
      month: two,
      day: two,
      hour: two,
      minute: two,
      second: two,
      timeZone: zone,
    });
  };
  useZone();
  const localise = (root) => {
    const times = root.matches?.("time") ? [root] : (root.querySelectorAll?.("time") ?? []);
    for (const time of times) {
      const moment = new Date(time.dateTime);
      if (!Number.isNaN(moment.getTime())) time.textContent = clock.format(moment);
    }
  };

  // Time fields: a person types the time of the zone, and what is sent is the instant it names, in
  // UTC as without a script, and beside it exactly. What nobody touched goes back as it came, to the
  // microsecond.
  const DAY = 86400000;
  const isTime = (moment) => !Number.isNaN(moment.getTime());
  const wallOf = (moment) => isoClock.format(moment).replace(" ", "T");
  const offsetAt = (moment) =>
    Date.parse(`${wallOf(moment)}Z`) - Math.floor(moment.getTime() / 1000) * 1000;
  // The instants that a wall clock may mean, by the offsets of the day before and the day after.
  const momentsOf = (typed) => {
    const utc = Date.parse(`${typed}Z`);
    if (Number.isNaN(utc)) return [new Date(Number.NaN)];
    return [-1, 1].map((days) => new Date(utc - offsetAt(new Date(utc + days * DAY))));
  };
  // As browsers read a local time: the first of two, and a time that is skipped by the old offset.
  const momentOf = (typed) => {
    const meant = momentsOf(typed);
    return meant.find((moment) => isTime(moment) && wallOf(moment) === typed) ?? meant[0];
  };
  const typedIn = (input) =>
    input.value.length === 16 ? `${input.value}:00` : input.value.slice(0, 19);
  // Where clocks are put forward a time is missing, where they are put back it comes twice.
  const oddity = (typed, moment) => {
    if (wallOf(moment) !== typed)
      return ` · ${typed.slice(11, 16)} is skipped that day; ${wallOf(moment).slice(11, 16)} is meant`;
    const other = momentsOf(typed).find(
      (each) => each.getTime() !== moment.getTime() && wallOf(each) === typed,
    );
    if (!other) return "";
    return ` · ${typed.slice(11, 16)} comes twice that day; the ${moment < other ? "first" : "second"} is meant`;
  };
  const localInput = (input) => {
    const { name } = input;
    const instant = input.form?.elements[`${name}_at`];
    if (!instant) return;
    const utc = Object.assign(document.createElement("input"), { type: "hidden", name });
    input.removeAttribute("name");
    instant.before(utc);
    const note = document.getElementById(`utc-${name}`);
    const first = { instant: instant.value, wall: "" };
    if (isTime(new Date(first.instant))) {
      input.value = wallOf(new Date(first.instant));
      first.wall = input.value;
    }
    let touched = false;
    const tell = () => {
      const moment = momentOf(typedIn(input));
      if (input.validity.badInput || (input.value && !isTime(moment))) instant.value = "incomplete";
      else if (!touched || (input.value && input.value === first.wall))
        instant.value = first.instant;
      else instant.value = input.value ? moment.toISOString() : "";
      const told = new Date(instant.value);
      utc.value = isTime(told) ? told.toISOString().slice(0, 19) : instant.value;
      if (note)
        note.textContent = isTime(told)
          ? `${told.toISOString().slice(0, 19).replace("T", " ")} UTC${oddity(typedIn(input), told)}`
          : "";
    };
    tell();
    input.addEventListener("input", () => {
      touched = true;
      tell();
    });
    // A date that was half typed tells nobody until now.
    input.form.addEventListener("submit", tell, true);
    // In another zone the same instant is written otherwise.
    document.addEventListener("zonechange", () => {
      const told = new Date(instant.value);
      if (!isTime(told)) return;
      input.value = wallOf(told);
      if (instant.value === first.instant) first.wall = input.value;
      tell();
    });
  };
  const localInputs = (root) => {
    for (const input of root.querySelectorAll?.('input[type="datetime-local"][name]') ?? [])
      localInput(input);
    for (const place of root.querySelectorAll?.("[data-zone]") ?? []) place.textContent = zone;
  };

  const chooseZone = () => {
    const choice = document.getElementById("zone");
    if (!choice) return;
    const zones = [OWN_ZONE, "UTC", ...(Intl.supportedValuesOf?.("timeZone") ?? [])];
    for (const each of new Set([zone, ...zones]))
      choice.add(new Option(each === OWN_ZONE ? `${each} · here` : each, each));
    choice.value = zone;
    choice.hidden = false;
    choice.addEventListener("change", () => {
      try {
        if (choice.value === OWN_ZONE) localStorage.removeItem("zone");
        else localStorage.setItem("zone", choice.value);
      } catch {
        return; // what can't be kept is not chosen
      }
      useZone();
      localise(document);
      document.dispatchEvent(new CustomEvent("zonechange"));
      localInputs(document);
    });
  };

  // Morphing: new content is made local first, so that nothing is written twice; what a person has
  // open or is typing into is left alone.
  const keeps = (node) => {
    if (node.matches?.("[data-still]")) return true;
    if (!node.matches?.("[data-keep]")) return false;
    return node.open || node.contains(document.activeElement);
  };
  if (window.Idiomorph) {
    Object.assign(Idiomorph.defaults.callbacks, {
      beforeNodeMorphed(old, fresh) {
        if (fresh.nodeType !== 1) return true;
        localise(fresh);
        return !keeps(old);
      },
      beforeNodeAdded(node) {
        if (node.nodeType === 1) {
          localise(node);
          localInputs(node);
        }
        return true;
      },
      beforeNodeRemoved: (node) =>
        !(node.nodeType === 1 && node.open && node.matches("[data-keep]")),
      beforeAttributeUpdated: (name, node) =>
        !(name === "open" || (name === "class" && node.classList.contains("htmx-request"))),
    });
  }

  // Polling: [data-poll] elements ask on the event `poll`. Nothing is asked in a hidden tab, and the
  // next question waits for the last one's answer.
  const PERIOD = 1000;
  const asking = new Set();
  // An answer may be shared by all who poll and up to 0.8 s old: right after an act of one's own it
  // would show the state before it.
  const SHARED = 900;
  let actedAt = 0;
  const askedAt = new WeakMap();
  const poll = () => {
    if (document.hidden || Date.now() - actedAt < SHARED) return;
    for (const place of document.querySelectorAll("[data-poll]")) {
      if (!asking.has(place)) htmx.trigger(place, "poll");
    }
    document.dispatchEvent(new CustomEvent("tick"));
  };
  setInterval(poll, PERIOD);
  document.addEventListener("visibilitychange", poll);
  document.addEventListener("htmx:configRequest", ({ detail, target }) => {
    if (detail.triggeringEvent?.type === "poll") {
      detail.headers["X-Poll"] = "1";
      asking.add(target);
      askedAt.set(target, Date.now());
    }
    // htmx knows of a form's pressed button only when it stands inside the form.
    const pressed = detail.triggeringEvent?.submitter;
    if (pressed?.name) detail.parameters[pressed.name] = pressed.value;
  });
  document.addEventListener("htmx:afterRequest", ({ detail, target }) => {
    asking.delete(target);
    if (detail.requestConfig?.verb === "post") actedAt = Date.now();
    const status = detail.xhr?.status ?? 0;
    reachable(status > 0 && status !== 502 && status !== 503 && status !== 504, status === 503);
  });

  document.addEventListener("htmx:beforeSwap", (event) => {
    const { detail } = event;
    const polled = detail.requestConfig.headers["X-Poll"];
    if (polled && askedAt.get(detail.requestConfig.elt) < actedAt + SHARED)
      detail.shouldSwap = false;
  });

  // Away: one notice, taken down by the first answer.
  let lastAnswer = new Date();
  const reachable = (yes, answers) => {
    const notice = document.getElementById("offline");
    if (!notice) return;
    if (yes) lastAnswer = new Date();
    else if (notice.hidden)
      notice.querySelector("[data-offline-since]").textContent = clock.format(lastAnswer);
    const cause = answers
      ? "Redis or PostgreSQL can’t do its work."
      : "The server can’t be reached.";
    notice.querySelector("strong").textContent = cause;
    notice.hidden = yes;
    document.body.classList.toggle("stale", !yes);
  };
  window.pages = { reachable, zone: () => zone };

  // Notes: what was done, and what went wrong. One speaks of the newest act: the next act takes the
  // others away. An error stays until it is read and closed, and is not said twice.
  const NOTE_MS = 6000;
  const MOST_ERRORS = 3;
  const notes = () => [...document.querySelectorAll("[data-toast]")];
  const note = (category, text) => {
    const model = document.getElementById("notes").content.querySelector(`.${category}`);
    const box = model.cloneNode(true);
    box.querySelector("span").textContent = text;
    // biome-ignore lint/performance/useDomNodeTextContent: its icon's and button's words do not count
    const same = notes().filter((each) => each.innerText.trim() === text);
    const errors = notes().filter((each) => each.matches(".error"));
    for (const old of [...same, ...errors.slice(0, -MOST_ERRORS)]) old.remove();
    document.getElementById("toasts").append(box);
    ageNotes();
  };
  const forgetNotes = () => {
    for (const each of notes()) if (!each.matches(".error")) each.remove();
  };
  const ageNotes = () => {
    for (const each of notes()) {
      if (each.dataset.aged || each.matches(".error")) continue;
      each.dataset.aged = "yes";
      setTimeout(() => each.remove(), NOTE_MS);
    }
  };
  document.addEventListener("htmx:beforeRequest", ({ detail }) => {
    if (detail.requestConfig.verb === "post") forgetNotes();
  });
  document.addEventListener("note", ({ detail }) => note(detail.category, detail.text));
  document.addEventListener("htmx:responseError", ({ detail }) => {
    if (detail.requestConfig.headers["X-Poll"] || detail.xhr.getResponseHeader("HX-Redirect"))
      return;
    const plain = detail.xhr.getResponseHeader("Content-Type")?.startsWith("text/plain");
    note("error", plain ? detail.xhr.responseText : `The server answered ${detail.xhr.status}`);
  });
  for (const failure of ["htmx:sendError", "htmx:timeout"]) {
    document.addEventListener(failure, ({ detail }) => {
      if (detail.requestConfig?.headers["X-Poll"]) return;
      note("error", "No answer from the server. Look whether it was done before you try again.");
    });
  }

  // The export is of the filter that is shown.
  document.addEventListener("htmx:pushedIntoHistory", () => {
    const link = document.getElementById("export");
    if (link) link.href = link.dataset.export + location.search;
  });

  // Spans of time, from now back or by the zone's day: they fill the two fields of the filter.
  const startOfDay = (now, days) => {
    const noon = Date.parse(`${wallOf(now).slice(0, 10)}T12:00:00Z`) + days * DAY;
    return momentOf(`${new Date(noon).toISOString().slice(0, 10)}T00:00:00`);
  };
  const spans = {
    hour: (now) => [new Date(now - 3600000), null],
    today: (now) => [startOfDay(now, 0), null],
    yesterday: (now) => [startOfDay(now, -1), startOfDay(now, 0)],
  };
  const fillSpan = ({ form, dataset }) => {
    spans[dataset.span](new Date()).forEach((moment, index) => {
      // By id: its name has gone to the field that is sent.
      const input = form.querySelector(`#f-${["from", "to"][index]}`);
      input.value = moment ? wallOf(moment) : "";
      input.dispatchEvent(new Event("input", { bubbles: true }));
    });
    form.requestSubmit();
  };

  // Spoken: figures that change every second are told at most every 15 s, and only when they changed.
  let spokenAt = 0;
  const speak = () => {
    const text = document.querySelector("[data-spoken]")?.dataset.spoken;
    const place = document.getElementById("spoken");
    if (!text || !place || place.textContent === text || Date.now() - spokenAt < 15000) return;
    spokenAt = Date.now();
    place.textContent = text;
  };
  document.addEventListener("tick", speak);

  // Menus and inline forms. One at a time, none after a click elsewhere, and none out of sight.
  const MENUS = "details.menu[open], details.inline[open]";
  const close = (menu) => {
    menu.open = false;
    menu.querySelector("summary").focus();
  };
  const showForm = (form) => {
    form.querySelector('[aria-invalid], input:not([type="hidden"])').focus();
    form.scrollIntoView({ block: "nearest" });
  };
  document.addEventListener(
    "toggle",
    ({ target }) => {
      if (!target.matches?.(MENUS)) return;
      const panel = target.lastElementChild;
      if (panel.matches("form")) showForm(panel);
      else panel.scrollIntoView({ block: "nearest" });
    },
    true,
  );

  // Confirmation: a form or button says what it will do; without a script the server asks on a page of its own.
  const confirmed = (question) => {
    const { dataset } = question;
    // The focus returns to what had it, and a button in a closed menu can't have it.
    const menu = question.closest(MENUS);
    if (menu) close(menu);
    const dialog = document.getElementById("confirm");
    dialog.querySelector("#confirm-title").textContent = dataset.confirmTitle || "Are you sure?";
    dialog.querySelector("#confirm-text").textContent = dataset.confirm;
    dialog.querySelector('[value="yes"]').textContent = dataset.confirmYes || "Go on";
    dialog.returnValue = "no";
    dialog.showModal();
    return new Promise((resolve) => {
      dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    });
  };
  document.addEventListener(
    "submit",
    async (event) => {
      const form = event.target;
      const submitter = event.submitter;
      const question = submitter?.dataset.confirm ? submitter : form;
      if (!question.dataset?.confirm || form.elements.confirmed?.value === "yes") return;
      event.preventDefault();
      event.stopImmediatePropagation();
      if (!(await confirmed(question))) return;
      const yes = document.createElement("input");
      Object.assign(yes, { type: "hidden", name: "confirmed", value: "yes" });
      form.append(yes);
      form.requestSubmit(submitter);
      yes.remove();
    },
    true,
  );

  // A second press while the first is under way would be answered instead of it, and an answer may
  // show a password that is shown once. (The form's key makes sure that nothing is done twice.)
  const UNDER_WAY = 5000;
  const sentAt = new WeakMap();
  document.addEventListener("submit", (event) => {
    const form = event.target;
    if (event.defaultPrevented || form.method !== "post") return;
    if (Date.now() - (sentAt.get(form) ?? 0) < UNDER_WAY) event.preventDefault();
    else sentAt.set(form, Date.now());
  });
  window.addEventListener("pageshow", ({ persisted }) => {
    if (persisted) for (const form of document.forms) sentAt.delete(form);
  });

  document.addEventListener("click", (event) => {
    const at = (selector) => event.target.closest(selector);
    at(".toast-close")?.closest("[data-toast]").remove();
    const span = at("[data-span]");
    if (span) fillSpan(span);
    const copy = at("[data-copy]");
    if (copy) {
      navigator.clipboard?.writeText(document.getElementById(copy.dataset.copy).textContent);
      copy.lastElementChild.textContent = "Copied";
    }
    const toggle = at(".side-toggle");
    if (toggle) {
      const open = document.getElementById("side-menu").classList.toggle("open");
      toggle.setAttribute("aria-expanded", String(open));
    }
    const all = at("[data-check-all]");
    if (all) for (const box of all.form.querySelectorAll('[name="id"]')) box.checked = all.checked;
    if (at("dialog")) return;
    for (const menu of document.querySelectorAll(MENUS)) {
      if (!menu.contains(event.target)) menu.open = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    const menu = document.querySelector(MENUS);
    if (menu) close(menu);
  });

  const prepare = (root) => {
    localise(root);
    localInputs(root);
    ageNotes();
    if (root.matches?.("form.inline-panel")) showForm(root);
  };
  document.addEventListener("DOMContentLoaded", () => {
    chooseZone();
    prepare(document);
  });
  document.addEventListener("htmx:load", ({ detail }) => prepare(detail.elt));
})();
