// What a LaTeX command stands for. Pairs of name and character, one class of symbol each.
const pairs = (text) => new Map(text.trim().split(/\s+/).reduce((all, word, i, words) => {
  if (i % 2 === 0) all.push([word, words[i + 1]]);
  return all;
}, []));

// Identifiers: letters and what stands where a letter does.
const LETTERS = pairs(`
  alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ
  nu ν xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω
  ell ℓ hbar ℏ imath ı jmath ȷ partial ∂ wp ℘ aleph ℵ beth ℶ`);
const UPRIGHT = pairs(`
  Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω infty ∞ emptyset ∅ varnothing ∅
  nabla ∇ Re ℜ Im ℑ angle ∠ measuredangle ∡ sphericalangle ∢ triangle △ square □ Box □ blacksquare ■ qed ■ Diamond ◊
  diamondsuit ♢ clubsuit ♣ heartsuit ♡ spadesuit ♠ star ⋆ bigstar ★ forall ∀ exists ∃ nexists ∄ top ⊤ bot ⊥ degree °
  prime ′ backprime ‵ checkmark ✓ dag † dagger † ddagger ‡ S § P ¶ pounds £ euro € yen ¥ copyright © AA Å aa å
  bigtriangleup △ bigtriangledown ▽ bigcirc ◯ surd √ flat ♭ sharp ♯ natural ♮ mho ℧ eth ð textdegree ° lozenge ◊
  blacktriangle ▲ triangledown ▽ bullet • % % $ $ # # & & _ _ colon :`);

// Operators, relations, arrows, punctuation: the browser knows how each is spaced.
const OPERATORS = pairs(`
  times × cdot ⋅ div ÷ pm ± mp ∓ ast ∗ circ ∘ oplus ⊕ ominus ⊖ otimes ⊗ odot ⊙ oslash ⊘ cap ∩ cup ∪ uplus ⊎
  sqcap ⊓ sqcup ⊔ vee ∨ wedge ∧ lor ∨ land ∧ lnot ¬ neg ¬ setminus ∖ smallsetminus ∖ wr ≀ amalg ⨿ diamond ⋄ bowtie ⋈
  leq ≤ le ≤ leqslant ⩽ leqq ≦ geq ≥ ge ≥ geqslant ⩾ geqq ≧ lt < gt > ll ≪ gg ≫ neq ≠ ne ≠ equiv ≡ approx ≈
  approxeq ≊ sim ∼ simeq ≃ cong ≅ ncong ≇ propto ∝ doteq ≐ asymp ≍ prec ≺ succ ≻ preceq ⪯ succeq ⪰ nless ≮ ngtr ≯
  nleq ≰ ngeq ≱ lesssim ≲ gtrsim ≳ triangleq ≜ coloneqq ≔ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇ subsetneq ⊊
  supsetneq ⊋ nsubseteq ⊈ in ∈ notin ∉ ni ∋ mid ∣ nmid ∤ parallel ∥ nparallel ∦ perp ⟂ vdash ⊢ dashv ⊣ models ⊨ vDash ⊨
  smile ⌣ frown ⌢ therefore ∴ because ∵ to → rightarrow → gets ← leftarrow ← leftrightarrow ↔ longrightarrow ⟶
  longleftarrow ⟵ longleftrightarrow ⟷ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ Longrightarrow ⟹ Longleftarrow ⟸
  Longleftrightarrow ⟺ implies ⟹ impliedby ⟸ iff ⟺ mapsto ↦ longmapsto ⟼ uparrow ↑ downarrow ↓ updownarrow ↕ Uparrow ⇑
  Downarrow ⇓ nearrow ↗ searrow ↘ swarrow ↙ nwarrow ↖ hookrightarrow ↪ hookleftarrow ↩ rightharpoonup ⇀
  rightleftharpoons ⇌ leadsto ⇝ rightsquigarrow ⇝ ldots … dots … dotsc … dotso … cdots ⋯ dotsb ⋯ dotsm ⋯ dotsi ⋯
  vdots ⋮ ddots ⋱ iddots ⋰ ldotp . cdotp · vartriangle △ trianglelefteq ⊴ lhd ⊲ rhd ⊳ blacktriangleright ▸`);

const FUNCTIONS = new Set(`sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan arccot arcsec arccsc ln log
  lg exp deg dim ker hom arg sgn lcm`.split(/\s+/));
// Names whose subscript goes below them in a displayed formula.
const LIMITS = new Map([..."lim max min sup inf det gcd Pr limsup liminf argmax argmin".split(" ").map((w) => [w, w]),
  ["limsup", "lim sup"], ["liminf", "lim inf"], ["argmax", "arg max"], ["argmin", "arg min"]]);
const BIG = pairs(`sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ bigvee ⋁ bigwedge ⋀ bigoplus ⨁ bigotimes ⨂ bigodot ⨀
  biguplus ⨄ bigsqcup ⨆`);
const INTEGRALS = pairs("int ∫ iint ∬ iiint ∭ oint ∮ smallint ∫");

const ACCENTS = pairs("hat ^ bar ¯ vec → dot ˙ ddot ¨ tilde ~ check ˇ breve ˘ acute ´ grave ` mathring ˚");
const OVER = pairs(`overline ‾ widehat ^ widetilde ~ overrightarrow → overleftarrow ← overleftrightarrow ↔ overbrace ⏞
  overparen ⏜ wideparen ⏜ overarc ⏜ arc ⏜ overbracket ⎴`);
const UNDER = pairs("underline _ underbrace ⏟ underrightarrow → underleftarrow ← underbracket ⎵ underbar _");
const LONG_ARROWS = pairs(`xrightarrow → xleftarrow ← xleftrightarrow ↔ xRightarrow ⇒ xLeftarrow ⇐ xmapsto ↦
  xlongequal =`);

const DELIMITERS = new Map([...pairs(`( ( ) ) [ [ ] ] | | / / { { } } lbrace { rbrace } lbrack [ rbrack ] langle ⟨
  rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ vert | lvert | rvert | Vert ‖ lVert ‖ rVert ‖ backslash \\ uparrow ↑
  downarrow ↓ lgroup ⟮ rgroup ⟯ llbracket ⟦ rrbracket ⟧ ulcorner ⌜ urcorner ⌝ < ⟨ > ⟩`), ["\\|", "‖"], [".", ""]]);
const OPENING = new Set([..."([{⟨⌊⌈⟮⟦⌜"]);
const CLOSING = new Set([...")]}⟩⌋⌉⟯⟧⌝"]);
const SIZES = new Map([["big", 1.2], ["Big", 1.8], ["bigg", 2.4], ["Bigg", 3]]);

const SPACES = new Map([[",", 0.167], [":", 0.222], [">", 0.222], [";", 0.278], ["!", -0.167], [" ", 0.25],
  ["thinspace", 0.167], ["medspace", 0.222], ["thickspace", 0.278], ["enspace", 0.5], ["quad", 1], ["qquad", 2],
  ["space", 0.25], ["nobreakspace", 0.25], ["\n", 0.25]]);
const LENGTHS = new Map([["em", 1], ["ex", 0.45], ["pt", 0.1], ["px", 0.0625], ["mm", 0.28], ["cm", 2.8], ["in", 7.2],
  ["mu", 0.0556]]);
// Commands without a meaning on this page, by the number of arguments that go with them.
const IGNORED = new Map([["limits", 0], ["nolimits", 0], ["nonumber", 0], ["notag", 0], ["allowbreak", 0], ["hfill", 0],
  ["displaylimits", 0], ["centering", 0], ["noindent", 0], ["left.", 0], ["label", 1], ["vspace", 1], ["strut", 0],
  ["tiny", 0], ["scriptsize", 0], ["footnotesize", 0], ["small", 0], ["normalsize", 0], ["large", 0], ["Large", 0],
  ["LARGE", 0], ["huge", 0], ["Huge", 0], ["color", 1], ["smallskip", 0], ["medskip", 0], ["bigskip", 0], ["/", 0],
  ["mathstrut", 0], ["relax", 0], ["protect", 0], ["boldmath", 0]]);

// Alphabets: first code points of capitals, small letters and digits, and the letters Unicode had before.
const ALPHABETS = new Map([
  ["bold", [0x1d400, 0x1d41a, 0x1d7ce, {}]],
  ["bb", [0x1d538, 0x1d552, 0x1d7d8, { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" }]],
  ["cal", [0x1d49c, 0x1d4b6, 0, { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ",
    e: "ℯ", g: "ℊ", o: "ℴ" }]],
  ["frak", [0x1d504, 0x1d51e, 0, { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" }]],
  ["sans", [0x1d5a0, 0x1d5ba, 0x1d7e2, {}]],
  ["mono", [0x1d670, 0x1d68a, 0x1d7f6, {}]],
]);
const FONTS = pairs(`mathrm normal rm normal mathnormal italic mathit italic it italic mathbf bold bf bold bold bold
  boldsymbol bold bm bold mathbfit bold pmb bold mathbb bb Bbb bb mathcal cal cal cal mathscr cal scr cal mathfrak frak
  frak frak mathsf sans sf sans mathtt mono tt mono`);
const TEXTS = pairs(`text normal textrm normal textnormal normal mbox normal hbox normal textup normal textsf normal
  textsc normal fbox normal framebox normal emph italic textit italic textsl italic textbf bold texttt mono
  intertext normal`);

// Environments: opening and closing delimiter and the alignment of their columns, the last one repeated.
const ENVIRONMENTS = new Map([
  ["matrix", ["", "", "c"]], ["smallmatrix", ["", "", "c"]], ["pmatrix", ["(", ")", "c"]], ["bmatrix", ["[", "]", "c"]],
  ["Bmatrix", ["{", "}", "c"]], ["vmatrix", ["|", "|", "c"]], ["Vmatrix", ["‖", "‖", "c"]], ["cases", ["{", "", "l"]],
  ["dcases", ["{", "", "l"]], ["rcases", ["", "}", "l"]], ["array", ["", "", "given"]], ["tabular", ["", "", "given"]],
  ["subarray", ["", "", "given"]], ["equation", ["", "", "rl"]], ["align", ["", "", "rl"]], ["aligned", ["", "", "rl"]],
  ["alignat", ["", "", "rl"]], ["alignedat", ["", "", "rl"]], ["flalign", ["", "", "rl"]], ["split", ["", "", "rl"]],
  ["eqnarray", ["", "", "rcl"]], ["gather", ["", "", "c"]], ["gathered", ["", "", "c"]], ["multline", ["", "", "c"]],
  ["displaymath", ["", "", "rl"]], ["math", ["", "", "rl"]],
]);
