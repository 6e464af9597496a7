// Collects elements past the right edge, intervals that take two lines, chart text that is clipped or too small, and
// images that did not load.
const shown = what => [...document.querySelectorAll(what)].filter(e => e.getClientRects().length);
const width = document.documentElement.clientWidth, images = [...document.images];
const cut = (a, b) => a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
return {
  scroll: document.documentElement.scrollWidth,
  window: width,
  outside: shown('body *')
    .filter(e => e.getBoundingClientRect().right > width + 1 && !(width > 760 && e.closest('.lines')))
    .map(e => e.outerHTML.slice(0, 80)),
  clipped: shown('svg text').filter(t => cut(t.getBoundingClientRect(), t.ownerSVGElement.getBoundingClientRect()))
    .map(t => t.textContent),
  broken: shown('td small').filter(e => /\u00a0to/.test(e.textContent) && e.getBoundingClientRect().height > 24)
    .map(e => e.textContent),
  small: shown('svg text').filter(t => t.getBoundingClientRect().height < 12).map(t => t.textContent),
  images: images.length,
  loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
  charts: shown('.figures svg').filter(s => s.getBoundingClientRect().height > 100).length,
  background: getComputedStyle(document.body).backgroundColor,
};
