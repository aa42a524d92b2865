// Draws the figures of notebook pages when they come into sight, in the colours of the page.
(function () {
  const look = () => {
    const scheme = document.body.getAttribute("data-md-color-scheme");
    const found = structuredClone(window.plotlyLooks[scheme] || window.plotlyLooks.default);
    found.layout.paper_bgcolor = found.layout.plot_bgcolor = "rgba(0,0,0,0)";
    return found;
  };
  const draw = (place) => {
    const { data, layout } = JSON.parse(place.querySelector("script").textContent);
    const panels = Object.keys(layout).filter((key) => key.startsWith("xaxis")).length;
    const canvas = document.createElement("div");
    // Titles and panels side by side need room; on a phone the figure scrolls.
    canvas.style.minWidth = `${Math.max(520, Math.min(200 * panels, 720))}px`;
    place.append(canvas);
    const drawn = { ...layout, template: look(), autosize: true };
    window.Plotly.newPlot(canvas, data, drawn, { responsive: true, displayModeBar: false });
    place.canvas = canvas;
  };
  const start = () => {
    const places = [...document.querySelectorAll(".figure")].filter((place) => !place.canvas);
    if (!places.length) return;
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        if (entry.isIntersecting && !entry.target.canvas) draw(entry.target);
      }
    }, { rootMargin: "600px" });
    places.forEach((place) => seen.observe(place));
    new MutationObserver(() => {
      for (const { canvas } of places) {
        if (canvas) window.Plotly.relayout(canvas, { template: look() });
      }
    }).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  };
  const load = (names) => {
    if (!names.length) return start();
    const script = document.createElement("script");
    script.src = new URL(names[0], base);
    script.onload = () => load(names.slice(1));
    document.head.append(script);
  };
  const base = new URL(".", document.currentScript.src);
  document.addEventListener("DOMContentLoaded", () => {
    if (document.querySelector(".figure")) load(["plotly.min.js", "looks.js"]);
  });
})();
