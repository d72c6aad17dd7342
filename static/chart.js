// The last 15 minutes of all products, or what is chosen: fetched once, then a sample a second. The
// server keeps them, so a reload, or another browser, shows the same.
(() => {
  // Where more than one sample is missing nobody looked, and no line is drawn.
  const gapSeconds = () => (shown.minutes ? 150 : 2);
  // A longer span has a sample a minute, and is asked for so often.
  const MINUTES_MS = 20000;
  let shown = { span: "15m", seconds: 15 * 60, minutes: false, product: "" };
  let columns;
  const empty = () => {
    columns = { second: [], accepted: [], refused: [], waiting: [], free: [] };
  };
  empty();

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const fade = (css, share) => {
    const hex = css.replace("#", "");
    const [r, g, b] = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return `rgba(${r}, ${g}, ${b}, ${share})`;
  };
  const short = (n) => {
    if (n === null || n === undefined) return "–";
    if (n >= 1e6) return `${+(n / 1e6).toFixed(1)}M`;
    if (n >= 1e4) return `${+(n / 1e3).toFixed(1)}k`;
    return n >= 10 || Number.isInteger(n) ? Math.round(n).toLocaleString("en") : n.toFixed(1);
  };

  const CHARTS = [
    {
      id: "traffic",
      series: [
        { name: "Accepted", of: "accepted", ink: "--series-1", scale: "y", fill: 0.12 },
        { name: "Refused", of: "refused", ink: "--series-2", scale: "y" },
      ],
    },
    {
      id: "stock",
      series: [
        { name: "Free units", of: "free", ink: "--series-4", scale: "y", fill: 0.1 },
        { name: "Orders waiting", of: "waiting", ink: "--series-3", scale: "y2" },
      ],
    },
  ];

  const axis = (more) => ({
    stroke: colour("--ink-2"),
    font: "11px Inter, sans-serif",
    grid: { stroke: colour("--line-2"), width: 1 },
    ticks: { show: false },
    gap: 6,
    ...more,
  });
  // From zero, and never flat against the top.
  const range = (_, _low, high) => [0, Math.max(high * 1.12, 4)];

  // The time axis: steps in seconds, and seconds in the labels only where the minutes would repeat.
  const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 180, 300, 600, 900, 1800, 3600, 7200, 10800, 21600];
  const clock = (step) => {
    const second = step < 60 ? "2-digit" : undefined;
    const format = new Intl.DateTimeFormat(undefined, {
      hour: "2-digit",
      minute: "2-digit",
      second,
      timeZone: window.pages.zone(),
    });
    return (moment) => format.format(new Date(moment * 1000));
  };
  // A label that the right edge would cut is left out; half of one is at most so wide.
  const LABEL_PX = 36;
  const fits = (plot, moment) =>
    !(plot.over.offsetLeft + plot.valToPos(moment, "x") + LABEL_PX > plot.width);
  const numbers = (_, splits) => splits.map(short);

  const draw = (chart) => {
    const place = document.getElementById(`chart-${chart.id}`);
    const two = chart.series[1].scale === "y2";
    const options = {
      width: place.clientWidth,
      height: 190,
      padding: [8, two ? 0 : 8, 0, 0],
      cursor: {
        sync: { key: "sale" },
        points: { size: 7 },
        y: false,
        drag: { x: false, y: false },
      },
      legend: { show: false },
      scales: { x: { time: true }, y: { range }, ...(two ? { y2: { range } } : {}) },
      axes: [
        axis({
          size: 28,
          space: 90,
          incrs: STEPS,
          values: (plot, splits, _at, _space, step) => {
            const label = clock(step);
            return splits.map((moment) => (fits(plot, moment) ? label(moment) : ""));
          },
        }),
        axis({ size: 46, values: numbers, stroke: colour(two ? chart.series[0].ink : "--ink-2") }),
        ...(two
          ? [
              axis({
                side: 1,
                size: 40,
                scale: "y2",
                grid: { show: false },
                values: numbers,
                stroke: colour(chart.series[1].ink),
              }),
            ]
          : []),
      ],
      series: [
        {},
        ...chart.series.map(({ name, ink, scale, fill }) => ({
          label: name,
          scale,
          stroke: colour(ink),
          width: 1.25,
          points: { show: false },
          fill: fill ? fade(colour(ink), fill) : undefined,
        })),
      ],
      hooks: { setCursor: [() => legend(chart)] },
    };
    place.textContent = "";
    chart.plot = new uPlot(options, dataOf(chart), place);
    legend(chart);
  };
  // With a point without values in each gap: uPlot joins what is next to each other.
  const dataOf = (chart) => {
    const names = ["second", ...chart.series.map(({ of }) => of)];
    const data = names.map(() => []);
    columns.second.forEach((second, index) => {
      const before = columns.second[index - 1];
      if (second - before > gapSeconds())
        for (const [place, column] of data.entries()) column.push(place ? null : before + 1);
      for (const [place, name] of names.entries()) data[place].push(columns[name][index]);
    });
    return data;
  };

  const legend = (chart) => {
    const place = document.getElementById(`legend-${chart.id}`);
    const data = chart.plot?.data ?? dataOf(chart);
    // What is pointed at, or else the newest; that is not now where nothing newer is to be had.
    const at = chart.plot?.cursor.idx ?? (unknown ? data[0].length : data[0].length - 1);
    while (place.children.length < chart.series.length) {
      const item = document.createElement("li");
      item.append(
        document.createElement("i"),
        document.createElement("span"),
        document.createElement("b"),
      );
      place.append(item);
    }
    chart.series.forEach(({ name, ink }, index) => {
      const [mark, label, value] = place.children[index].children;
      mark.className = `mark-${ink.slice(-1)}`;
      label.textContent = name;
      value.textContent = short(data[index + 1][at]);
    });
  };

  const show = () => {
    for (const chart of CHARTS) {
      const place = document.getElementById(`chart-${chart.id}`);
      if (columns.second.length < 2) {
        place.innerHTML = '<p class="chart-none"></p>';
        const { none, noneOfMinutes } = document.getElementById("charts").dataset;
        place.firstChild.textContent = shown.minutes ? noneOfMinutes : none;
        legend(chart);
      } else if (chart.plot) {
        chart.plot.setData(dataOf(chart));
        legend(chart);
      } else draw(chart);
    }
  };

  const add = (fresh) => {
    const last = columns.second.at(-1) ?? 0;
    fresh.second.forEach((second, index) => {
      if (second <= last) return;
      for (const name of Object.keys(columns)) columns[name].push(fresh[name][index]);
    });
    while (columns.second.length && columns.second[0] < columns.second.at(-1) - shown.seconds) {
      for (const name of Object.keys(columns)) columns[name].shift();
    }
  };

  let unknown = false;
  let asking = null;
  let askedAt = 0;
  const update = async () => {
    if (asking === shown || document.hidden) return;
    // Each answer to the page's polling brings the newest seconds; only what came before is asked for.
    const newest = JSON.parse(document.getElementById("board").dataset.samples);
    const polled = shown.span === "15m" && !shown.product;
    if (polled && columns.second.length && columns.second.at(-1) >= newest.second[0] - 1) {
      unknown = false;
      add(newest);
      show();
      return;
    }
    if (shown.minutes && columns.second.length && Date.now() - askedAt < MINUTES_MS) return;
    const wanted = shown;
    asking = wanted;
    askedAt = Date.now();
    try {
      const { span, product } = wanted;
      const since = columns.second.at(-1) ?? 0;
      const source = document.getElementById("charts").dataset.source;
      const query = new URLSearchParams({ since, span, product });
      const answer = await fetch(`${source}?${query}`, { headers: { "X-Poll": "1" } });
      const found = answer.ok && !answer.redirected ? await answer.json() : null;
      // Something else may have been chosen meanwhile.
      if (wanted === shown) {
        unknown = !found;
        if (found) add(found);
        show();
      }
    } catch {
      // The page's own polling tells that the server is away.
    } finally {
      if (asking === wanted) asking = null;
    }
  };

  // What is chosen stands in the address, so that a reload keeps it, and a link tells it.
  const choices = () => ["span", "product"].map((name) => document.getElementById(`chart-${name}`));
  const choose = () => {
    const [span, product] = choices();
    const { seconds, minutes } = span.selectedOptions[0].dataset;
    shown = {
      span: span.value,
      seconds: Number(seconds),
      minutes: minutes !== undefined,
      product: product.value,
    };
    empty();
  };
  const prepareChoice = () => {
    const asked = new URLSearchParams(location.search);
    for (const select of choices()) {
      const value = asked.get(select.id.replace("chart-", ""));
      if ([...select.options].some((option) => option.value === value)) select.value = value;
      select.addEventListener("change", () => {
        choose();
        const address = new URL(location.href);
        for (const name of ["span", "product"]) {
          const standard = name === "span" ? "15m" : "";
          if (shown[name] === standard) address.searchParams.delete(name);
          else address.searchParams.set(name, shown[name]);
        }
        history.replaceState(history.state, "", address);
        again();
        update();
      });
    }
    choose();
    document.querySelector(".chart-choice").hidden = false;
  };

  const again = () => {
    for (const chart of CHARTS) {
      chart.plot?.destroy();
      chart.plot = undefined;
    }
    show();
  };
  document.addEventListener("DOMContentLoaded", () => {
    prepareChoice();
    update();
    let timer;
    new ResizeObserver(() => {
      clearTimeout(timer);
      timer = setTimeout(() => {
        for (const chart of CHARTS) {
          chart.plot?.setSize({
            width: document.getElementById(`chart-${chart.id}`).clientWidth,
            height: 190,
          });
        }
      }, 60);
    }).observe(document.getElementById("charts"));
  });
  document.addEventListener("tick", update);
  document.addEventListener("themechange", again);
  document.addEventListener("zonechange", again);
})();
