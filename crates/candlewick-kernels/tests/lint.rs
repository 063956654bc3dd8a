//! What clang lets through and Metal does not, and the rules of the dialect: see docs/kernel-dialect.md.

use candlewick_kernels::{KernelFile, Storage, Target, assemble};
use std::collections::{BTreeMap, BTreeSet};

/// The files that are written in the dialect: not the dictionaries themselves.
fn kernel_files() -> BTreeMap<&'static str, &'static str> {
    KernelFile::ALL
        .iter()
        .flat_map(|file| file.parts().iter().copied().chain([file.source()]))
        .map(|source| (source.path, source.text))
        .collect()
}

/// The text with comments and strings blanked out, line by line.
fn without_comments(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    for line in text.lines() {
        let code = line.find("//").map_or(line, |at| &line[..at]);
        let mut quoted = false;
        for character in code.chars() {
            if character == '"' {
                quoted = !quoted;
            }
            result.push(if quoted && character != '"' { ' ' } else { character });
        }
        result.push('\n');
    }
    assert!(!result.contains("/*"), "block comments are not used");
    result
}

/// Identifiers and numbers, and single characters for the rest; `1.0e-5f` is one token.
fn tokens(line: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let bytes = line.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        let first = bytes[at];
        if first.is_ascii_alphabetic() || first == b'_' {
            while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'_') {
                at += 1;
            }
        } else if first.is_ascii_digit() {
            while at < bytes.len()
                && (bytes[at].is_ascii_alphanumeric()
                    || bytes[at] == b'.'
                    || (matches!(bytes[at], b'+' | b'-')
                        && matches!(bytes[at - 1], b'e' | b'E')
                        && !line[start..].starts_with("0x")))
            {
                at += 1;
            }
        } else {
            at += 1;
        }
        if !line[start..at].trim().is_empty() {
            tokens.push(&line[start..at]);
        }
    }
    tokens
}

const FORBIDDEN: [(&str, &str); 20] = [
    ("goto", "Metal has none"),
    ("double", "Metal has none"),
    ("new", "Metal has none"),
    ("delete", "Metal has none"),
    ("throw", "Metal has none"),
    ("try", "Metal has none"),
    ("virtual", "Metal has none"),
    ("static", "DEVFN says it"),
    ("auto", "the type is part of the explanation"),
    ("asm", "belongs to a dictionary"),
    ("device", "the word is DEVICE"),
    ("constant", "the word is PARAM"),
    ("thread", "the word is THREAD"),
    ("threadgroup", "the word is THREADGROUP"),
    ("kernel", "the word is KERNEL"),
    ("long", "the word is INT64"),
    ("half", "the word is T"),
    ("bfloat", "the word is T"),
    ("include", "the text is assembled"),
    ("atomic_fetch_add_explicit", "sums are in two stages, for the same bits every time"),
];

/// What is wrong with a text in the dialect.
fn lint(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let code = without_comments(text);
    for (number, line) in code.lines().enumerate() {
        let mut report = |what: String| found.push(format!("{}: {what}: {}", number + 1, line.trim()));
        let tokens = tokens(line);
        for (index, &token) in tokens.iter().enumerate() {
            if let Some((_, why)) = FORBIDDEN.iter().find(|(word, _)| *word == token) {
                report(format!("`{token}`: {why}"));
            }
            let number = token.as_bytes()[0].is_ascii_digit();
            let hexadecimal = token.starts_with("0x");
            if number && !hexadecimal && (token.contains('.') || token.contains('e')) && !token.ends_with('f')
            {
                report(format!("`{token}` is a double"));
            }
            if number && matches!(token.trim_end_matches(['u', 'U']), "31" | "32") {
                let shifted = index >= 2 && (tokens[index - 2] == ">" || tokens[index - 2] == "<");
                if !shifted {
                    report(format!("`{token}`: SIMDGROUP_SIZE, or a shift by it"));
                }
            }
            // A lambda: `[` where no array can be subscripted, with a body after it.
            if token == "[" && line.contains('{') {
                let before = index.checked_sub(1).map_or("", |before| tokens[before]);
                let subscript = before == "]"
                    || before == ")"
                    || before.starts_with(|c: char| c.is_alphabetic() || c == '_');
                if !subscript || before == "return" {
                    report("a lambda".into());
                }
            }
            // A pointer or reference whose type has no place before it on the line.
            let type_word = |word: &str| {
                matches!(word, "T" | "U" | "float" | "uint" | "ADAPTER" | "TABLE" | "TARGET" | "Team")
            };
            let declares = (token == "*" || token == "&")
                && index > 0
                && type_word(tokens[index - 1])
                && tokens
                    .get(index + 1)
                    .is_some_and(|next| next.starts_with(|c: char| c.is_alphabetic()) || *next == ")");
            if declares {
                let mut at = index - 1;
                if at > 0 && tokens[at - 1] == "const" {
                    at -= 1;
                }
                if at == 0 || !matches!(tokens[at - 1], "DEVICE" | "THREADGROUP" | "THREAD") {
                    report(format!("a pointer to {} without a place", tokens[index - 1]));
                }
            }
        }
        let directive = line.trim_start();
        if directive.starts_with("#if") || directive.starts_with("#elif") {
            for target in ["METAL", "CUDA", "SIMULATOR"] {
                if tokens.iter().any(|token| token.contains(target)) {
                    report("a condition on the target".into());
                }
            }
        }
    }
    found.extend(recursion(&code));
    found
}

/// Functions that can reach themselves.
fn recursion(code: &str) -> Vec<String> {
    let all = tokens(code);
    let mut calls: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut current = None;
    let mut depth = 0_usize;
    for (index, &token) in all.iter().enumerate() {
        match token {
            "{" => depth += 1,
            "}" => depth = depth.saturating_sub(1),
            "(" if index > 0 => {
                let name = all[index - 1];
                if depth == 0 && name == "KERNEL" {
                    // Nothing calls a kernel: it would not compile.
                    current = None;
                } else if depth == 0 && name != "PARAM" {
                    current = Some(name);
                    calls.entry(name).or_default();
                } else if let Some(caller) = current
                    && depth > 0
                {
                    calls.entry(caller).or_default().insert(name);
                }
            }
            _ => {}
        }
    }
    let reaches = |from: &str| {
        let mut seen = BTreeSet::new();
        let mut next: Vec<&str> = calls.get(from).into_iter().flatten().copied().collect();
        while let Some(name) = next.pop() {
            if seen.insert(name) {
                next.extend(calls.get(name).into_iter().flatten());
            }
        }
        seen.contains(from)
    };
    calls.keys().filter(|name| reaches(name)).map(|name| format!("`{name}` calls itself")).collect()
}

#[test]
fn kernels_keep_the_rules() {
    let mut found = Vec::new();
    for (path, text) in kernel_files() {
        found.extend(lint(text).into_iter().map(|what| format!("{path}:{what}")));
    }
    println!("lint: {} files, {} faults", kernel_files().len(), found.len());
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_lint_sees_each_fault() {
    let faults = [
        "if (i > 5u) goto end;",
        "const float v = 1.0 * x[i];",
        "const float v = 1e-5 * x[i];",
        "if (LANE < 32u) y[i] = 0.0f;",
        "const uint lane = TID.x & 31u;",
        "y[i] = [](float v) { return v; }(x[i]);",
        "template <typename U> DEVFN U first(const U* p) { return p[0]; }",
        "DEVFN float first(float* p) { return p[0]; }",
        "DEVFN float power(float v, uint n) { return n == 0u ? 1.0f : v * power(v, n - 1u); }",
        "DEVFN float even(uint n) { return odd(n); }\nDEVFN float odd(uint n) { return even(n); }",
        "#if __METAL_VERSION__ >= 310",
        "static float total;",
        "half h = half(x[i]);",
        "threadgroup float* p = s;",
    ];
    for fault in faults {
        assert!(!lint(fault).is_empty(), "the lint misses: {fault}");
    }
    for correct in [
        "const uint high = uint(block >> 32);",
        "DEVFN float first(THREAD const float* p) { return p[0]; }",
        "const float v = 1.0e-5f * x[i] * 0xffu;",
        "for (uint i = 0u; i < WIDTH; i++) { y[i] *= r; }",
    ] {
        assert_eq!(lint(correct), Vec::<String>::new(), "{correct}");
    }
    println!("lint: {} planted faults, all seen", faults.len());
}

/// Words that the three dictionaries define for kernels: upper-case macros and types, and functions.
fn dialect_words() -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    // CUDA has no built-in library here, so its dictionary defines nearly every word; the others add the rest.
    for target in Target::ALL {
        let code = without_comments(target.dialect().text);
        for line in code.lines() {
            let parts = tokens(line);
            match parts.as_slice() {
                ["#", "define", word, ..]
                    if !word.starts_with("SIMULATOR") && !word.starts_with("SIMD_BUTTERFLY") =>
                {
                    words.insert((*word).to_owned());
                }
                ["typedef", .., word, ";"] => {
                    words.insert((*word).to_owned());
                }
                _ => {}
            }
            if let Some(at) = line.find("DEVFN ")
                && !line.contains("#define")
                && let Some(open) = line[at..].find('(')
                && let Some(name) = tokens(&line[at..at + open]).iter().rev().find(|token| token.len() > 1)
            {
                let name = if *name == "float" || *name == "uint" { "as_type" } else { name };
                words.insert(name.to_owned());
            }
        }
    }
    for internal in ["size_t", "uint32_t", "operator", "|", "TILE_MULTIPLY", "tile_matrix", "tile_values"] {
        words.remove(internal);
    }
    words.retain(|word| !word.starts_with("simulator_") && !word.starts_with("tile_matrices"));
    words
}

#[test]
fn every_word_of_the_dialect_is_in_the_table() {
    let guide = include_str!("../../../docs/kernel-dialect.md");
    let rows: String = guide.lines().filter(|line| line.starts_with('|')).collect::<Vec<_>>().join("\n");
    let missing: Vec<_> = dialect_words()
        .into_iter()
        .filter(|word| {
            !rows.split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|row_word| row_word == word)
        })
        .collect();
    assert!(missing.is_empty(), "docs/kernel-dialect.md lacks {missing:?}");
}

#[test]
fn positions_are_known_to_every_target() {
    for word in ["TG_POS", "TID", "TG_SIZE", "LANE", "SIMD_ID", "N_SIMD", "SIMDGROUP_SIZE"] {
        for target in Target::ALL {
            assert!(target.dialect().text.contains(word), "{word} on {}", target.name());
        }
    }
}

#[test]
fn the_assembled_text_points_back_at_its_files() {
    let text = assemble(Target::Metal, KernelFile::ColumnSum, Storage::BF16, &[("STRIPS", "4".to_owned())]);
    for expected in [
        "#line 1 \"kernels/dialect/metal.h\"",
        "#define T bfloat",
        "#define STRIPS 4",
        "#line 1 \"kernels/column_sum.metal\"",
    ] {
        assert!(text.contains(expected), "{expected}");
    }
}
