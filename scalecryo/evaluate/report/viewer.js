// A map as a surface that is turned with mouse or finger; no library, no network. Each element .surface holds the grid
// in its data attributes (see surface.py). The surface is made here, by surface nets (Gibson 1998), for every contour.
"use strict";
(() => {
  async function gridOf(element) {
    const packed = Uint8Array.from(atob(element.dataset.grid), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // Vertices (x, y, z in voxels from the middle), normals that point outwards, and triangles of the surface value = level.
  function surfaceNets(grid, n, level) {
    const index = new Int32Array(n * n * n).fill(-1), positions = [], normals = [], triangles = [];
    const at = (x, y, z) => grid[(z * n + y) * n + x];
    const corner = new Float32Array(8);
    for (let z = 0; z < n - 1; z++) for (let y = 0; y < n - 1; y++) for (let x = 0; x < n - 1; x++) {
      let mask = 0;
      for (let c = 0; c < 8; c++) {
        corner[c] = at(x + (c & 1), y + ((c >> 1) & 1), z + (c >> 2)) - level;
        if (corner[c] >= 0) mask |= 1 << c;
      }
      if (mask === 0 || mask === 255) continue;
      // The vertex is the mean of where the cell's edges are crossed.
      let px = 0, py = 0, pz = 0, count = 0;
      for (let a = 0; a < 8; a++) for (let bit = 1; bit < 8; bit <<= 1) {
        const b = a | bit;
        if (b === a || ((mask >> a) & 1) === ((mask >> b) & 1)) continue;
        const t = corner[a] / (corner[a] - corner[b]);
        px += (a & 1) + (bit === 1 ? t : 0);
        py += ((a >> 1) & 1) + (bit === 2 ? t : 0);
        pz += (a >> 2) + (bit === 4 ? t : 0);
        count++;
      }
      px /= count; py /= count; pz /= count;
      index[(z * n + y) * n + x] = positions.length / 3;
      positions.push(x + px - n / 2, y + py - n / 2, z + pz - n / 2);
      normals.push(...normalAt(at, n, x + px, y + py, z + pz));
    }
    for (let z = 1; z < n - 1; z++) for (let y = 1; y < n - 1; y++) for (let x = 1; x < n - 1; x++) {
      const inside = at(x, y, z) >= level;
      for (let axis = 0; axis < 3; axis++) {
        const next = at(x + (axis === 0), y + (axis === 1), z + (axis === 2)) >= level;
        if (inside === next) continue;
        // The four cells around this edge, in turn.
        const u = [[0, 1, 0], [0, 0, 1], [1, 0, 0]][axis], v = [[0, 0, 1], [1, 0, 0], [0, 1, 0]][axis];
        const cell = (i, j) => index[((z - i * u[2] - j * v[2]) * n + y - i * u[1] - j * v[1]) * n + x - i * u[0] - j * v[0]];
        const [a, b, c, d] = [cell(0, 0), cell(1, 0), cell(1, 1), cell(0, 1)];
        if (inside) triangles.push(a, b, c, a, c, d); else triangles.push(a, c, b, a, d, c);
      }
    }
    return { positions: new Float32Array(positions), normals: new Float32Array(normals), triangles: new Uint32Array(triangles) };
  }

  // Down the gradient of the trilinear grid, over one voxel.
  function normalAt(at, n, x, y, z) {
    const value = (x, y, z) => {
      x = Math.min(Math.max(x, 0), n - 1.001); y = Math.min(Math.max(y, 0), n - 1.001); z = Math.min(Math.max(z, 0), n - 1.001);
      const i = Math.floor(x), j = Math.floor(y), k = Math.floor(z), u = x - i, v = y - j, w = z - k;
      const row = (j, k) => at(i, j, k) * (1 - u) + at(i + 1, j, k) * u;
      return (row(j, k) * (1 - v) + row(j + 1, k) * v) * (1 - w) + (row(j, k + 1) * (1 - v) + row(j + 1, k + 1) * v) * w;
    };
    const g = [value(x - 1, y, z) - value(x + 1, y, z), value(x, y - 1, z) - value(x, y + 1, z), value(x, y, z - 1) - value(x, y, z + 1)];
    const length = Math.hypot(...g) || 1;
    return g.map((c) => c / length);
  }

  const VERTEX = `#version 300 es
    in vec3 position; in vec3 normal; uniform mat3 turn; uniform vec2 scale; uniform float reach;
    out vec3 across; out float far;
    void main() {
      vec3 p = turn * position; across = turn * normal; far = 0.5 - 0.5 * p.z / reach;
      gl_Position = vec4(p.xy * scale, -p.z / (2.0 * reach), 1.0);
    }`;
  const FRAGMENT = `#version 300 es
    precision highp float; in vec3 across; in float far; out vec4 colour;
    void main() {
      vec3 n = normalize(across); if (!gl_FrontFacing) n = -n;
      float lit = max(dot(n, normalize(vec3(-0.43, 0.5, 0.75))), 0.0);
      vec3 base = gl_FrontFacing ? vec3(0.56, 0.71, 0.86) : vec3(0.75, 0.6, 0.5);
      vec3 shade = base * (0.3 + 0.6 * lit + 0.1 * max(n.z, 0.0)) + 0.25 * pow(lit, 20.0);
      colour = vec4(mix(shade, vec3(1.0), 0.45 * clamp(far, 0.0, 1.0)), 1.0);
    }`;

  function programOf(gl) {
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source); gl.compileShader(shader); gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    return program;
  }

  const product = (a, b) => { // of 3 × 3 matrices by columns, as WebGL has them
    const c = new Array(9).fill(0);
    for (let i = 0; i < 3; i++) for (let j = 0; j < 3; j++) for (let k = 0; k < 3; k++) c[3 * j + i] += a[3 * k + i] * b[3 * j + k];
    return c;
  };
  const about = (axis, angle) => {
    const c = Math.cos(angle), s = Math.sin(angle);
    return axis === "x" ? [1, 0, 0, 0, c, s, 0, -s, c] : [c, 0, -s, 0, 1, 0, s, 0, c];
  };
  const SIDES = { z: [1, 0, 0, 0, 1, 0, 0, 0, 1], y: [1, 0, 0, 0, 0, -1, 0, 1, 0], x: [0, 0, 1, 1, 0, 0, 0, 1, 0] };

  async function view(element) {
    const canvas = element.querySelector("canvas"), slider = element.querySelector("input"), words = element.querySelector("output");
    const gl = canvas.getContext("webgl2", { antialias: true, preserveDrawingBuffer: true });
    const data = Object.fromEntries(Object.entries(element.dataset).map(([key, value]) => [key, Number(value)]));
    if (!gl) { element.classList.add("flat"); words.textContent = "This browser shows no WebGL: see the pictures."; return; }
    const grid = await gridOf(element), program = programOf(gl), n = data.size;
    gl.useProgram(program); gl.enable(gl.DEPTH_TEST); gl.clearColor(1, 1, 1, 1);
    const buffers = ["position", "normal"].map((name) => {
      const place = gl.getAttribLocation(program, name), buffer = gl.createBuffer();
      gl.bindBuffer(gl.ARRAY_BUFFER, buffer); gl.enableVertexAttribArray(place); gl.vertexAttribPointer(place, 3, gl.FLOAT, false, 0, 0);
      return buffer;
    });
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    const uniform = (name) => gl.getUniformLocation(program, name);
    let turn = product(about("x", 0.35), about("y", -0.5)), zoom = 1, count = 0, waiting = false, mirrored = false;

    function draw() {
      waiting = false;
      const ratio = window.devicePixelRatio || 1, width = Math.round(canvas.clientWidth * ratio), height = Math.round(canvas.clientHeight * ratio);
      if (canvas.width !== width || canvas.height !== height) { canvas.width = width; canvas.height = height; }
      gl.viewport(0, 0, width, height); gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
      const half = zoom * 2 / (1.02 * n), least = Math.min(width, height);
      // The other hand: z is turned over, and so is the sense in which triangles run.
      gl.uniformMatrix3fv(uniform("turn"), false, mirrored ? product(turn, [1, 0, 0, 0, 1, 0, 0, 0, -1]) : turn);
      gl.frontFace(mirrored ? gl.CW : gl.CCW);
      gl.uniform2f(uniform("scale"), half * least / width, half * least / height);
      gl.uniform1f(uniform("reach"), 0.87 * n);
      gl.drawElements(gl.TRIANGLES, count, gl.UNSIGNED_INT, 0);
      canvas.dataset.triangles = count / 3;
    }
    const redraw = () => { if (!waiting) { waiting = true; requestAnimationFrame(draw); } };

    function contour() {
      const level = Number(slider.value), step = (data.high - data.low) / 255;
      const mesh = surfaceNets(grid, n, Math.max((level - data.low) / step, 0.5));
      buffers.forEach((buffer, i) => { gl.bindBuffer(gl.ARRAY_BUFFER, buffer); gl.bufferData(gl.ARRAY_BUFFER, i ? mesh.normals : mesh.positions, gl.STATIC_DRAW); });
      gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, mesh.triangles, gl.STATIC_DRAW);
      count = mesh.triangles.length;
      const threshold = (level - data.low) / step, voxels = grid.reduce((sum, value) => sum + (value >= threshold), 0);
      const volume = voxels * data.spacing ** 3;
      words.textContent = `contour ${level.toPrecision(3)} (suggested ${data.level.toPrecision(3)}): encloses ${Math.round(volume).toLocaleString("en")} Å³`;
      redraw();
    }

    const fingers = new Map();
    canvas.addEventListener("pointerdown", (e) => { canvas.setPointerCapture(e.pointerId); fingers.set(e.pointerId, e); });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (e) => fingers.delete(e.pointerId));
    canvas.addEventListener("pointermove", (e) => {
      const before = fingers.get(e.pointerId);
      if (!before) return;
      if (fingers.size === 1) {
        turn = product(product(about("x", (e.clientY - before.clientY) * 0.01), about("y", (e.clientX - before.clientX) * 0.01)), turn);
      } else {
        const other = [...fingers.values()].find((f) => f.pointerId !== e.pointerId);
        const apart = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY) || 1;
        zoom = Math.min(Math.max(zoom * apart(e) / apart(before), 0.3), 8);
      }
      fingers.set(e.pointerId, e);
      redraw();
    });
    canvas.addEventListener("wheel", (e) => { e.preventDefault(); zoom = Math.min(Math.max(zoom * Math.exp(-e.deltaY * 0.001), 0.3), 8); redraw(); }, { passive: false });
    element.querySelectorAll("button").forEach((button) => button.addEventListener("click", () => {
      if (button.value === "reset") { slider.value = data.level; zoom = 1; mirrored = false; contour(); }
      else if (button.value === "mirror") { mirrored = !mirrored; redraw(); }
      else { turn = SIDES[button.value]; redraw(); }
    }));
    slider.addEventListener("input", contour);
    new ResizeObserver(redraw).observe(canvas);
    contour();
  }
  document.querySelectorAll(".surface").forEach((element) => view(element).catch((error) => {
    element.classList.add("flat");
    element.querySelector("output").textContent = `The surface cannot be shown here (${error.message}): see the pictures.`;
  }));
})();
