// SPDX-License-Identifier: MIT
// Commands of TeX that stand for one sign.

const table = (text: string): Readonly<Record<string, string>> =>
  Object.fromEntries(text.trim().split(/\s+/).map((pair) => pair.split("=", 2) as [string, string]));

/** Letters, set as identifiers. */
export const LETTERS = table(`
alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ lambda=λ mu=μ
nu=ν xi=ξ omicron=ο pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ
omega=ω Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω hbar=ℏ ell=ℓ imath=ı
jmath=ȷ Re=ℜ Im=ℑ aleph=ℵ beth=ℶ wp=℘ infty=∞ emptyset=∅ varnothing=∅ partial=∂ nabla=∇ top=⊤ bot=⊥ angle=∠
degree=° triangle=△ square=□ Box=□ blacksquare=■ checkmark=✓ dots=… ldots=… cdots=⋯ vdots=⋮ ddots=⋱ dotsc=… dotsb=⋯ hdots=…
`);

/** Operators and relations. */
export const OPERATORS = table(`
pm=± mp=∓ times=× div=÷ cdot=⋅ ast=∗ star=⋆ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ oslash=⊘ odot=⊙ dagger=† ddagger=‡
cap=∩ cup=∪ uplus=⊎ sqcap=⊓ sqcup=⊔ vee=∨ lor=∨ wedge=∧ land=∧ setminus=∖ wr=≀ amalg=⨿ le=≤ leq=≤ leqslant=⩽ ge=≥ geq=≥
geqslant=⩾ ne=≠ neq=≠ ll=≪ gg=≫ equiv=≡ sim=∼ simeq=≃ approx=≈ cong=≅ propto=∝ asymp=≍ doteq=≐ prec=≺ succ=≻ preceq=⪯
succeq=⪰ subset=⊂ supset=⊃ subseteq=⊆ supseteq=⊇ subsetneq=⊊ in=∈ notin=∉ ni=∋ mid=∣ nmid=∤ parallel=∥ perp=⊥ vdash=⊢
dashv=⊣ models=⊨ vDash=⊨ to=→ rightarrow=→ gets=← leftarrow=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔
implies=⟹ impliedby=⟸ iff=⟺ mapsto=↦ longrightarrow=⟶ longleftarrow=⟵ Longrightarrow=⟹ longmapsto=⟼ hookrightarrow=↪
uparrow=↑ downarrow=↓ updownarrow=↕ Uparrow=⇑ Downarrow=⇓ rightharpoonup=⇀ rightleftharpoons=⇌ nearrow=↗ searrow=↘
leadsto=⇝ forall=∀ exists=∃ nexists=∄ neg=¬ lnot=¬ therefore=∴ because=∵ colon=: coloneqq=≔ triangleq=≜ bigstar=★ prime=′
backslash=\\ surd=√ lesssim=≲ gtrsim=≳ trianglelefteq=⊴ ltimes=⋉ rtimes=⋊ bowtie=⋈ And=& lt=< gt=>
`);

/** Large operators, whose limits stand above and below where there is room. */
export const LARGE = table(`
sum=∑ prod=∏ coprod=∐ bigcap=⋂ bigcup=⋃ bigvee=⋁ bigwedge=⋀ bigoplus=⨁ bigotimes=⨂ bigodot=⨀ bigsqcup=⨆ biguplus=⨄
`);

/** Integrals, whose limits stand beside them. */
export const INTEGRALS = table("int=∫ iint=∬ iiint=∭ oint=∮");

/** Brackets that may grow. */
export const BRACKETS = table(`
lbrace={ rbrace=} lbrack=[ rbrack=] langle=⟨ rangle=⟩ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ vert=| lvert=| rvert=| Vert=‖
lVert=‖ rVert=‖ lgroup=⟮ rgroup=⟯
`);

/** Signs above (or below) something. */
export const ACCENTS = table(`
hat=^ widehat=^ check=ˇ tilde=~ widetilde=~ acute=´ grave=\` dot=˙ ddot=¨ dddot=⃛ breve=˘ bar=‾ overline=‾ vec=→
overrightarrow=→ overleftarrow=← overbrace=⏞ mathring=˚
`);
export const UNDER = table("underline=_ underbrace=⏟ underrightarrow=→");

/** Named functions; those with limits below them end in *. */
export const FUNCTIONS = new Map(
  `arccos arcsin arctan arg cos cosh cot coth csc deg det* dim exp gcd* hom inf* ker lg lim* liminf* limsup* ln log max*
  min* Pr* sec sin sinh sup* tan tanh argmax* argmin* tr rank sgn diag softmax ReLU`
    .split(/\s+/)
    .map((name) => (name.endsWith("*") ? [name.slice(0, -1), true] : [name, false])),
);

/** Widths of spaces, in em. */
export const SPACES: Readonly<Record<string, string>> = {
  ",": "0.17em", ":": "0.22em", ">": "0.22em", ";": "0.28em", "!": "-0.17em", " ": "0.25em", quad: "1em", qquad: "2em",
  enspace: "0.5em", thinspace: "0.17em", medspace: "0.22em", thickspace: "0.28em", negthinspace: "-0.17em",
};

/** Alphabets: where their capitals, small letters and digits begin in Unicode, and the letters that stand elsewhere. */
export const ALPHABETS: Readonly<Record<string, { upper: number; lower?: number; digit?: number; holes?: string }>> = {
  mathbb: { upper: 0x1d538, lower: 0x1d552, digit: 0x1d7d8, holes: "CℂHℍNℕPℙQℚRℝZℤ" },
  mathcal: { upper: 0x1d49c, lower: 0x1d4b6, holes: "BℬEℰFℱHℋIℐLℒMℳRℛeℯgℊoℴ" },
  mathscr: { upper: 0x1d49c, lower: 0x1d4b6, holes: "BℬEℰFℱHℋIℐLℒMℳRℛeℯgℊoℴ" },
  mathfrak: { upper: 0x1d504, lower: 0x1d51e, holes: "CℭHℌIℑRℜZℨ" },
  mathbf: { upper: 0x1d400, lower: 0x1d41a, digit: 0x1d7ce },
  boldsymbol: { upper: 0x1d468, lower: 0x1d482, digit: 0x1d7ce },
  pmb: { upper: 0x1d468, lower: 0x1d482, digit: 0x1d7ce },
  bm: { upper: 0x1d468, lower: 0x1d482, digit: 0x1d7ce },
  mathsf: { upper: 0x1d5a0, lower: 0x1d5ba, digit: 0x1d7e2 },
  mathtt: { upper: 0x1d670, lower: 0x1d68a, digit: 0x1d7f6 },
};

/** Environments: the brackets around them, and how their columns are set. */
export const ENVIRONMENTS: Readonly<Record<string, readonly [string, string, string]>> = {
  matrix: ["", "", "center"], pmatrix: ["(", ")", "center"], bmatrix: ["[", "]", "center"],
  Bmatrix: ["{", "}", "center"], vmatrix: ["|", "|", "center"], Vmatrix: ["‖", "‖", "center"],
  smallmatrix: ["", "", "center"], cases: ["{", "", "left"], dcases: ["{", "", "left"], aligned: ["", "", "sides"], align: ["", "", "sides"],
  "align*": ["", "", "sides"], split: ["", "", "sides"], gathered: ["", "", "center"], gather: ["", "", "center"],
  "gather*": ["", "", "center"], equation: ["", "", "center"], "equation*": ["", "", "center"],
  array: ["", "", "center"], alignedat: ["", "", "sides"],
};

/** Commands that change nothing here. */
export const IGNORED = new Set([
  "displaystyle", "textstyle", "scriptstyle", "limits", "nolimits", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl",
  "Bigr", "biggl", "biggr", "Biggl", "Biggr", "bigm", "nonumber", "notag", "hline", "rm", "bf", "it", "strut", "mathstrut",
]);
