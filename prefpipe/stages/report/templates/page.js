"use strict";
(() => {
  const one = (id) => document.getElementById(id);
  const search = one("search"), change = one("change"), count = one("count"), all = one("all");
  if (search) {
    const items = [...document.querySelectorAll(".asked[data-change]")];
    const texts = items.map((item) => item.textContent.toLowerCase());
    let most = 12;
    const filter = () => {
      const words = search.value.toLowerCase();
      let fitting = 0;
      items.forEach((item, i) => {
        const fits = texts[i].includes(words) && (!change.value || item.dataset.change === change.value);
        fitting += fits ? 1 : 0;
        item.hidden = !fits || fitting > most;
      });
      count.textContent = `${Math.min(fitting, most)} of ${fitting} shown, ${items.length} in all`;
      all.hidden = fitting <= most;
    };
    all.addEventListener("click", () => { most = items.length; filter(); search.focus(); });
    search.addEventListener("input", filter);
    change.addEventListener("change", filter);
    filter();
  }

  const grid = one("curves") && JSON.parse(one("curves").textContent);
  if (grid) {
    const choice = one("loss"), sliders = [...document.querySelectorAll("[data-setting]")];
    const path = (frame) => frame.querySelector(".mark-line path");
    const draw = () => {
      const of = grid.losses[choice.value];
      let place = 0;
      for (const slider of sliders) {
        const stops = of.settings[slider.dataset.setting];
        slider.parentElement.hidden = !stops;
        if (!stops) continue;
        slider.max = stops.length - 1;
        place = place * stops.length + Number(slider.value);
        const said = `${stops[slider.value]}`;
        slider.setAttribute("aria-valuetext", said);
        slider.parentElement.querySelector("output").textContent = said;
      }
      for (const frame of document.querySelectorAll("[data-frame]")) {
        const values = of[frame.dataset.frame][place], middle = values[grid.margins.indexOf(0)];
        const [width, height, reach, low, high] = frame.dataset.scale.split(" ").map(Number);
        const points = values.map((value, i) => [
          ((grid.margins[i] + reach) / (2 * reach)) * width,
          height * (1 - (value / middle - low) / (high - low)),
        ]);
        path(frame).setAttribute("d", "M" + points.map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`).join("L"));
        frame.querySelector("[data-at-0]").textContent = middle.toPrecision(4);
      }
      one("beta-unit").textContent = of.beta;
    };
    choice.addEventListener("change", draw);
    sliders.forEach((slider) => slider.addEventListener("input", draw));
    draw();
  }

  const prompt = one("candidates"), beta = one("policy-beta");
  if (prompt) {
    const tables = [...document.querySelectorAll("[data-candidates]")], betas = beta.dataset.stops.split(" ");
    const show = () => {
      tables.forEach((table, i) => { table.hidden = String(i) !== prompt.value; });
      beta.setAttribute("aria-valuetext", betas[beta.value]);
      one("policy-beta-value").textContent = betas[beta.value];
      for (const cell of document.querySelectorAll("[data-shares]")) {
        const share = Number(cell.dataset.shares.split(" ")[beta.value]);
        cell.querySelector(".bar").style.width = `${share * 6}rem`;
        cell.querySelector(".n").textContent = `${(100 * share).toFixed(1)}%`;
      }
    };
    prompt.addEventListener("change", show);
    beta.addEventListener("input", show);
    show();
  }
})();
