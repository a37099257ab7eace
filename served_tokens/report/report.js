'use strict';
const {pieces, samples} = JSON.parse(document.getElementById('data').textContent);
const at = id => document.getElementById(id), number = n => n.toLocaleString('en');
const DRAWN = 10000;  // tokens of a sample that are drawn at first: a browser is slow with more
let current = -1, active = null;

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function tokenElement(piece, position, sample) {
  const [ids, text, special] = piece, made = element('span', special ? 'token special' : 'token', '');
  text.split(/(\n)/).forEach(part => {
    if (part === '\n') made.append(element('i', 'break', '↵'));
    made.append(part);
  });
  if (sample.at !== null && sample.at >= position && sample.at < position + ids.length) made.classList.add('first');
  made.dataset.position = position;
  made.dataset.ids = ids.join(' + ');
  made.title = `${made.dataset.ids}: ${JSON.stringify(text)}`;
  return made;
}

function show(index, move, whole = false) {
  if (!samples.length) return;
  current = (index + samples.length) % samples.length;
  const sample = samples[current], box = document.createDocumentFragment();
  const printed = `--show ${sample.trajectory}:${sample.turns.at(-1)} of the check prints them`;
  const gap = held => held > 0 && box.append(element('span', 'gap', `… ${number(held)} tokens are not in this page: ${printed} …`));
  const middle = sample.at ?? (sample.runs.find(run => run[0]) ?? [0, 0])[1];
  const first = whole ? 0 : Math.max(0, Math.min(middle - DRAWN / 2, sample.tokens - DRAWN)), last = whole ? Infinity : first + DRAWN;
  let position = sample.runs.length ? sample.runs[0][1] : 0, closed = 0;
  const open = () => {
    if (closed) box.append(element('button', 'gap', `… show ${number(closed)} more tokens …`));
    closed = 0;
  };
  gap(position);
  for (const [supervised, , held] of sample.runs) {
    const run = element(supervised ? 'mark' : 'span', '', '');
    for (const piece of held) {
      const size = pieces[piece][0].length;
      if (position >= first && position < last) {
        open();
        run.append(tokenElement(pieces[piece], position, sample));
      } else closed += size;
      position += size;
    }
    box.append(run);
  }
  open();
  gap(sample.tokens - position);
  active = null;
  at('tokens').replaceChildren(box);
  const begin = at('tokens').querySelector('.first') || at('tokens').querySelector('mark');
  if (!whole) at('tokens').scrollTop = begin ? begin.offsetTop - 90 : 0;
  at('sample').value = current;
  at('mismatch').textContent = sample.mismatch;
  at('message').textContent = '';
  const served = sample.served === sample.tokens ? '' : `; as it is served it has ${number(sample.served)} tokens`;
  at('note').textContent = `${current + 1} of ${samples.length} (${sample.why}): ${sample.name}, ${sample.source}, ${sample.place}: `
    + `${number(sample.tokens)} tokens, ${number(sample.supervised)} supervised${served}`;
  at('trajectory').value = sample.trajectory;
  at('turn').value = sample.turns.at(-1);
  if (move) history.replaceState(null, '', '#s' + current);
}

function jump(trajectory, turn) {
  for (let step = 1; step <= samples.length; step++) {  // from the one that is shown, so that a second jump finds the next
    const index = (current + step) % samples.length, sample = samples[index];
    if (sample.trajectory === trajectory && (turn === null || sample.turns.includes(turn))) return show(index, true);
  }
  at('message').textContent = `row ${trajectory}${turn === null ? '' : ', turn ' + turn} is not among the ${samples.length} samples `
    + `of this page; --show ${trajectory}:${turn === null ? 'TURN' : turn} of the check shows it in the terminal`;
}

function inspect(token) {
  if (!token) return;
  if (active) active.classList.remove('active');
  active = token;
  token.classList.add('active');
  const kind = (token.closest('mark') ? 'supervised' : 'context') + (token.classList.contains('special') ? ', special' : '');
  at('inspector').textContent = `token ${number(+token.dataset.position)}, id ${token.title}, ${kind}`;
}

function fromHash() {
  const match = /^#s(\d+)$/.exec(location.hash);
  if (match && +match[1] < samples.length) {
    show(+match[1], false);
    at('viewer').scrollIntoView();
  }
  return match;
}

samples.forEach((sample, index) => {
  const option = element('option', '', `${sample.place}: ${number(sample.tokens)} tokens (${sample.why})`);
  option.value = index;
  at('sample').append(option);
});
at('sample').addEventListener('change', event => show(+event.target.value, true));
at('previous').addEventListener('click', () => show(current - 1, true));
at('next').addEventListener('click', () => show(current + 1, true));
at('choose').addEventListener('submit', event => {
  event.preventDefault();
  jump(+at('trajectory').value, at('turn').value === '' ? null : +at('turn').value);
});
at('tokens').addEventListener('click', event => {
  if (!event.target.matches('button')) return;
  show(current, false, true);
  at('tokens').focus({preventScroll: true});
});
for (const rate of document.querySelectorAll('.rate')) rate.addEventListener('input', () => {
  const hours = rate.dataset.hours / rate.value, cell = rate.closest('td');
  cell.parentElement.nextElementSibling.cells[cell.cellIndex].textContent = isFinite(hours) ? hours.toFixed(2) : '–';
});
for (const kind of ['mouseover', 'click']) at('tokens').addEventListener(kind, event => inspect(event.target.closest('.token')));
at('tokens').addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  const all = [...at('tokens').querySelectorAll('.token')];
  inspect(all[active ? Math.min(Math.max(all.indexOf(active) + step, 0), all.length - 1) : 0]);
  active.scrollIntoView({block: 'nearest'});
});
window.addEventListener('hashchange', fromHash);
if (!fromHash()) show(0, false);
