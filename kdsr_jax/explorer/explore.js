// The explorer's page. All that comes from the shop is set as text, never as markup; the server's policy forbids the rest.
'use strict';

const SHOWN = 3; // rows of a list before "all of them"
const $ = (id) => document.getElementById(id);
const state = {user: null, history: [], without: [], k: 10, item: null}; // what the address keeps behind its #
const view = {about: null, history: [], after: []}; // what the server said
const turns = {}; // of what is being asked; only the newest answer counts

// Elements

function make(tag, settings = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name === 'click') node.addEventListener('click', value);
    else if (name === 'vars') for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function picture(item) {
  if (!item.picture) return make('span', {class: 'blank'});
  const image = make('img', {src: item.picture, alt: '', loading: 'lazy'});
  image.addEventListener('error', () => image.replaceWith(make('span', {class: 'blank'})));
  return image;
}

const text = (item) => make('bdi', {}, item.title);
const named = (item) => make('button', {class: 'name', type: 'button', title: item.id, click: () => choose(item.id)}, text(item));
const signed = (value) => (value < 0 ? '−' : '+') + Math.abs(value).toFixed(2);
const percent = (value) => `${(100 * value).toFixed(2)}%`;

// The server

async function ask(name, values, post) {
  const address = `/api/${name}`;
  const answer = post
    ? await fetch(address, {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(values)})
    : await fetch(values ? `${address}?${new URLSearchParams(values)}` : address);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

// Runs work unless a newer call of the same kind has begun meanwhile; errors are shown.
async function newest(kind, work, show) {
  const turn = (turns[kind] = (turns[kind] ?? 0) + 1);
  try {
    const found = await work();
    if (turn === turns[kind]) show(found);
    return turn === turns[kind];
  } catch (error) {
    if (turn === turns[kind]) complain(error instanceof TypeError ? 'The server does not answer; is it still running?' : error.message);
    return false;
  }
}

function complain(message) {
  $('error').textContent = message;
  $('error').hidden = !message;
  if (message) $('lists').classList.remove('waiting');
}

// The history

function keep() {
  history.replaceState(null, '', `#${encodeURIComponent(JSON.stringify(state))}`);
}

function recall() {
  try {
    const saved = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    for (const name of Object.keys(state)) if (saved && saved[name] !== undefined) state[name] = saved[name];
  } catch { /* nothing was kept, or nothing that can be read: begin anew */ }
  if (!Array.isArray(state.history)) state.history = [];
  if (!Array.isArray(state.without) || left() <= 0) state.without = [];
}

function take(user) {
  return newest('user', () => ask('user', user === null ? null : {user}), (found) => {
    Object.assign(state, {user: found.user, history: found.history.map((item) => item.id), without: [], item: null});
    view.after = found.after;
    refresh();
  });
}

function add(item) {
  state.history.push(item.id);
  refresh();
}

function toggle(place) {
  state.without = state.without.includes(place) ? state.without.filter((other) => other !== place) : [...state.without, place];
  refresh();
}

function clear() {
  Object.assign(state, {user: null, history: [], without: [], item: null});
  view.after = [];
  refresh();
}

async function choose(id) {
  state.item = id;
  complain('');
  markChosen();
  if ((await explain()) && matchMedia('(max-width: 68rem)').matches) $('details').scrollIntoView({behavior: 'smooth'});
}

// What remains of the history: the server takes no empty one.
const left = () => state.history.length - state.without.length;

function refresh() {
  keep();
  complain('');
  $('lists').classList.add('waiting');
  const {history: items, without, k} = state;
  const work = left() > 0 ? () => ask('recommend', {history: items, without, k}, true) : async () => null;
  explain();
  return newest('lists', work, (found) => {
    if (found) view.history = found.history;
    if (!items.length) view.history = [];
    showHistory(found ? found.read : 0);
    showLists(found);
  });
}

function showHistory(read) {
  const whole = view.history.length, note = [];
  if (state.user !== null) note.push(make('span', {}, 'User ', make('bdi', {}, state.user), ': '));
  if (!whole) note.push('Empty. Add items by their titles, or take a user.');
  else note.push(`${whole.toLocaleString('en')} ${whole === 1 ? 'item' : 'items'}, oldest first`);
  if (state.without.length) note.push(`; ${state.without.length} left out`);
  if (left() > read && read) note.push(`; the model reads the newest ${read}`);
  $('told').replaceChildren(...note);
  let unread = left() - read;
  const focused = [...$('strip').querySelectorAll('.toggle')].indexOf(document.activeElement);
  $('strip').replaceChildren(...view.history.map((item, place) => {
    const out = state.without.includes(place), old = !out && unread-- > 0;
    const button = make('button', {class: 'toggle', type: 'button', click: () => toggle(place)}, out ? 'put back' : 'leave out');
    return make('li', {class: out ? 'out' : old ? 'unread' : null}, picture(item), named(item), button);
  }));
  if (focused >= 0) $('strip').querySelectorAll('.toggle')[focused]?.focus();
  if (!state.without.length) $('strip').scrollLeft = $('strip').scrollWidth;
  const taken = make('ul', {}, ...view.after.map((item) => make('li', {}, picture(item), named(item))));
  $('after').replaceChildren(...(view.after.length ? [make('span', {class: 'note'}, 'Taken afterwards, in the test part: '), taken] : []));
}

// The lists

function showLists(found) {
  const changed = state.without.length > 0;
  $('lists').classList.remove('waiting');
  $('lists').replaceChildren(...view.about.runs.map((run, index) => {
    const {recommendations, dropped} = found ? found.runs[index] : {recommendations: [], dropped: []};
    const other = view.about.runs.length > 1 ? view.about.runs[1 - index].name : null;
    const list = make('ol', {class: 'recs', 'aria-label': run.name}, ...recommendations.map((row) => recommended(row, other, changed)));
    const gone = dropped.length && make('p', {class: 'dropped'}, 'No longer here: ',
      ...dropped.flatMap((row, at) => [at ? ', ' : '', named(row.item), ` ${row.before} → ${row.place}`]));
    return make('div', {}, make('h3', {}, make('bdi', {}, run.name)), make('p', {class: 'note'}, run.model), list, gone || null);
  }));
  markChosen();
}

function recommended(row, other, changed) {
  const later = view.after.some((item) => item.id === row.item.id);
  const because = Object.entries(row.because).map(([modality, reason]) => make('div', {class: 'why'},
    `${modality}: like `, text(reason.item), ' · ',
    make('span', {class: 'score'}, signed(reason.score) + (reason.code === null ? '' : `, code ${reason.code}`))));
  const elsewhere = other && make('div', {class: 'why'}, make('bdi', {}, other), `: place ${row.elsewhere}`);
  return make('li', {class: later ? 'hit' : null, 'data-item': row.item.id}, make('span', {class: 'rank'}, row.place), picture(row.item),
    make('div', {}, named(row.item), ' ', later ? make('b', {class: 'badge'}, 'taken afterwards') : null, ' ',
      changed ? moved(row) : null, ...because, elsewhere));
}

function moved({place, before}) {
  const up = before - place, title = `place ${before} with the whole history`;
  if (!up) return make('span', {class: 'move', title}, '=');
  return make('span', {class: `move ${up > 0 ? 'up' : 'down'}`, title}, `${up > 0 ? '▲' : '▼'} ${Math.abs(up)}`);
}

function markChosen() {
  for (const row of document.querySelectorAll('.recs li')) row.classList.toggle('chosen', row.dataset.item === state.item);
}

// Why, and what is alike

function explain() {
  keep();
  if (state.item === null) {
    turns.details = (turns.details ?? 0) + 1;
    $('details').replaceChildren(make('p', {class: 'note'}, 'Choose an item to see what speaks for it and what is similar.'));
    return false;
  }
  const {history: items, without, item} = state;
  const reasons = left() > 0 ? ask('explain', {history: items, without, item}, true) : null;
  return newest('details', () => Promise.all([ask('similar', {item}), reasons]), ([alike, why]) => {
    const button = make('button', {id: 'add', type: 'button', click: () => add(alike.item)}, 'Add to the history');
    const where = make('p', {class: 'note'}, make('bdi', {}, alike.item.id), why ? `: ${placed(why.places)}` : null);
    const parts = [make('div', {class: 'head'}, picture(alike.item), make('h2', {}, text(alike.item)))];
    parts.push(make('div', {class: 'line'}, where, button));
    if (why) parts.push(...reasonsFor(why));
    parts.push(...Object.entries(alike.modalities).flatMap(similar));
    $('details').replaceChildren(...parts);
  });
}

function placed(places) {
  if (places[0] === null) return 'stands in the history';
  return `place ${view.about.runs.map((run, index) => `${places[index]} in ${run.name}`).join(', ')}`;
}

function reasonsFor(why) {
  const parts = [];
  for (const [modality, links] of Object.entries(why.modalities)) {
    parts.push(make('h3', {}, `Nearest in the history: ${modality}`));
    parts.push(...(links.length ? rows(links, linked(links)) : [make('p', {class: 'note'}, `Not known: one side has no ${modality} features.`)]));
  }
  if (Object.values(why.modalities).some((links) => links.length)) parts.push(make('p', {class: 'note'}, legend(why)));
  if (why.places[0] !== null && why.alone.length) parts.push(...alone(why));
  if (why.shares) parts.push(...shares(why.shares));
  return parts;
}

function legend({modalities}) {
  const predicted = Object.values(modalities).flat().some((link) => link.student_score !== null);
  const scores = `Bars: ${view.about.score_fn} of the two items by the teacher's features`;
  return predicted ? `${scores}, and as the student's tables predict it. Code: the kind of pair; orange where the student predicts another.` : `${scores}.`;
}

function rows(entries, show) {
  const first = make('ol', {class: 'rows'}, ...entries.slice(0, SHOWN).map(show));
  if (entries.length <= SHOWN) return [first];
  const rest = make('ol', {class: 'rows'}, ...entries.slice(SHOWN).map(show));
  return [first, make('details', {}, make('summary', {}, `${entries.length - SHOWN} more`), rest)];
}

function linked(links) {
  const values = links.flatMap((link) => [link.teacher_score, link.student_score]).filter((value) => value !== null);
  const most = view.about.score_fn === 'cosine' ? 1 : Math.max(...values.map(Math.abs), 1e-9);
  const line = (who, score, code, same) => make('div', {class: `pair ${who}`}, make('span', {}, who), bar(score / most),
    make('span', {class: 'value'}, signed(score)), make('span', {class: same ? 'code' : 'code other'}, code === null ? '' : `code ${code}`));
  return (link) => make('li', {}, picture(link.item), make('div', {}, named(link.item),
    line('teacher', link.teacher_score, link.teacher_code, true),
    link.student_score === null ? null : line('student', link.student_score, link.student_code, link.student_code === link.teacher_code)));
}

function bar(value) {
  const size = Math.min(1, Math.abs(value)) / 2;
  const fill = make('span', {class: 'fill', vars: {'--share': percent(size), '--from': percent(value < 0 ? 0.5 - size : 0.5)}});
  return make('span', {class: 'track'}, fill);
}

function alone({places: [now], alone: others}) {
  const moves = others.map((row) => ({...row, before: now})).filter((row) => row.place !== now);
  moves.sort((a, b) => Math.abs(b.place - now) - Math.abs(a.place - now));
  const show = (row) => make('li', {}, picture(row.item), make('div', {}, 'without ', named(row.item), make('br'),
    `place ${now} → ${row.place} `, moved(row)));
  const none = make('p', {class: 'note'}, 'Leaving out any one of them keeps its place.');
  return [make('h3', {}, 'If one item were left out'), ...(moves.length ? rows(moves, show) : [none])];
}

function shares(weights) {
  const entries = Object.entries(weights);
  return [make('h3', {}, 'Weights in the fusion'), make('p', {class: 'note'}, 'Mean over the items of the history that the model reads.'),
    make('div', {class: 'shares', role: 'presentation'}, ...entries.map(([, share], at) => make('i', {class: `s${at % 8}`, vars: {'--share': percent(share)}}))),
    make('ul', {class: 'legend'}, ...entries.map(([name, share], at) =>
      make('li', {}, make('span', {class: `key s${at % 8}`}), `${name === 'item' ? 'item id' : name} ${(100 * share).toFixed(0)} %`)))];
}

function similar([modality, entries]) {
  const list = make('ol', {class: 'strip', tabindex: 0, 'aria-label': `Similar by ${modality}`}, ...entries.map((row) =>
    make('li', {}, picture(row.item), named(row.item), make('span', {class: 'why'}, signed(row.score)))));
  return [make('h3', {}, `Similar by ${modality}`), entries.length ? list : make('p', {class: 'note'}, `It has no ${modality} features.`)];
}

// Search

function picker(input, list, name, key, row, pick) {
  const close = () => {
    turns[name] = (turns[name] ?? 0) + 1;
    list.replaceChildren();
  };
  const choose_ = (entry) => {
    input.value = '';
    close();
    input.focus();
    pick(entry);
  };
  let answered = '';  // the words whose results are in the list
  const search = (words) => newest(name, () => ask(name, {words}), (answer) => {
    answered = words;
    const found = answer[key], rest = answer.found - found.length;
    const entries = found.map((entry) => make('li', {}, make('button', {type: 'button', click: () => choose_(entry)}, ...row(entry))));
    const note = !found.length ? 'nothing found' : rest ? `and ${rest.toLocaleString('en')} more` : null;
    list.replaceChildren(...entries, ...(note ? [make('li', {class: 'note'}, note)] : []));
  });
  let timer;
  input.addEventListener('input', () => {
    clearTimeout(timer);
    if (input.value.trim()) timer = setTimeout(() => search(input.value), 120);
    else close();
  });
  input.parentElement.addEventListener('keydown', (event) => {
    const buttons = [...list.querySelectorAll('button')], at = buttons.indexOf(document.activeElement);
    if (event.key === 'Escape') close();
    else if (event.key === 'Enter' && event.target === input) { if (buttons.length && answered === input.value) buttons[0].click(); }
    else if (event.key === 'ArrowDown' && buttons.length) buttons[Math.min(at + 1, buttons.length - 1)].focus();
    else if (event.key === 'ArrowUp' && at >= 0) (at ? buttons[at - 1] : input).focus();
    else return;
    event.preventDefault();
  });
  document.addEventListener('pointerdown', (event) => {
    if (!input.parentElement.contains(event.target)) close();
  });
}

// Start

function present(about) {
  view.about = about;
  document.title = `Explore ${about.name}`;
  $('shop').textContent = about.name;
  const count = (number, what) => `${number.toLocaleString('en')} ${what}`;
  $('facts').textContent = `${count(about.users, 'users')}, ${count(about.items, 'items')}, ${about.modalities.join(' and ') || 'item ids alone'}`;
  $('k').max = about.most;
}

async function start() {
  recall();
  $('k').value = state.k;
  $('k').addEventListener('change', () => {
    state.k = $('k').valueAsNumber;
    refresh();
  });
  $('any').addEventListener('click', () => take(null));
  $('clear').addEventListener('click', clear);
  const item = (entry) => [picture(entry), text(entry), make('span', {class: 'tail'}, entry.id)];
  const user = (entry) => [make('bdi', {}, entry.title), make('span', {class: 'tail'}, `${entry.length} items`)];
  picker($('words'), $('found-items'), 'items', 'items', item, add);
  picker($('users'), $('found-users'), 'users', 'users', user, (entry) => take(entry.id));
  if (!(await newest('about', () => ask('about'), present))) return;
  if (!state.history.length) return void take(null);
  if (state.user !== null) await newest('user', () => ask('user', {user: state.user}), (found) => (view.after = found.after));
  refresh();
}

start();
