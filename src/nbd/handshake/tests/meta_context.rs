//! LIST_META_CONTEXT and SET_META_CONTEXT: what is found, what is chosen, and for which export.

use super::*;

fn queries(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

fn set(export: &str, names: &[&str]) -> Vec<u8> {
    option(OPT_SET_META_CONTEXT, &queries(export, names))
}

fn list(export: &str, names: &[&str]) -> Vec<u8> {
    option(OPT_LIST_META_CONTEXT, &queries(export, names))
}

fn structured() -> Vec<u8> {
    option(OPT_STRUCTURED_REPLY, b"")
}

fn go(export: &str) -> Vec<u8> {
    option(OPT_GO, &info_data(export, &[]))
}

/// Runs options after STRUCTURED_REPLY; the answers behind its ACK, and the end.
fn after_structured(options: &[Vec<u8>]) -> (Result<Progress, HandshakeError>, Vec<OptionReply>) {
    let input = [structured(), options.concat()].concat();
    let exports = [export("a", false), export("b", false)];
    let (end, output) = run(&exports, BOTH, &input);
    (end, replies(output).split_off(1))
}

fn kinds_of(replies: &[OptionReply]) -> Vec<u32> {
    replies.iter().map(|(_, kind, _)| *kind).collect()
}

fn has_context(end: Result<Progress, HandshakeError>) -> bool {
    match end {
        Ok(Progress::Chosen(agreement)) => agreement.has_context,
        other => panic!("{other:?}"),
    }
}

#[test]
fn list_finds_the_context_by_name_by_wildcard_and_without_a_query() {
    for names in [&[][..], &["base:"], &["base:allocation"], &["x-y:z", "base:", "base:allocation"]] {
        let (_, replies) = after_structured(&[list("a", names)]);
        let found = (OPT_LIST_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\0base:allocation".to_vec());
        assert_eq!(replies, [found, (OPT_LIST_META_CONTEXT, REP_ACK, vec![])], "{names:?}");
    }
    for names in [&["qemu:"][..], &["base:other"], &["base"], &[""], &["base:allocation:"], &["\u{fffd}:"]] {
        let (_, replies) = after_structured(&[list("a", names)]);
        assert_eq!(kinds_of(&replies), [REP_ACK], "{names:?}");
    }
}

#[test]
fn set_chooses_by_name_only() {
    let (end, replies) = after_structured(&[set("a", &["qemu:x", "base:allocation", "base:allocation"]), go("a")]);
    assert_eq!(replies[0], (OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x01base:allocation".to_vec()));
    assert_eq!(kinds_of(&replies), [REP_META_CONTEXT, REP_ACK, REP_INFO, REP_ACK]);
    assert!(has_context(end));
    for names in [&[][..], &["base:"], &["qemu:dirty"]] {
        let (end, replies) = after_structured(&[set("a", names), go("a")]);
        assert_eq!(kinds_of(&replies), [REP_ACK, REP_INFO, REP_ACK]);
        assert!(!has_context(end));
    }
}

#[test]
fn a_choice_is_for_one_export() {
    let choice = set("a", &["base:allocation"]);
    assert!(!has_context(after_structured(&[choice.clone(), go("b")]).0));
    let exports = [export("a", false), export("b", false)];
    for (name, expected) in [(b"a", true), (b"b", false)] {
        let input = [structured(), choice.clone(), option(OPT_EXPORT_NAME, name)].concat();
        assert_eq!(has_context(run(&exports, BOTH, &input).0), expected);
    }
    // Looking at another export, or failing to start it, changes nothing.
    let info = option(OPT_INFO, &info_data("b", &[]));
    assert!(has_context(after_structured(&[choice, info, go("nothing"), go("a")]).0));
}

#[test]
fn a_later_choice_replaces_an_earlier_one_even_if_it_fails() {
    let choice = set("a", &["base:allocation"]);
    let too_long = option(OPT_SET_META_CONTEXT, &vec![0; OPTION_DATA_BYTES_MAX as usize + 1]);
    for (later, kind) in [
        (set("b", &["base:allocation"]), REP_META_CONTEXT),
        (set("a", &[]), REP_ACK),
        (set("nothing", &["base:allocation"]), REP_ERR_UNKNOWN),
        (option(OPT_SET_META_CONTEXT, b"x"), REP_ERR_INVALID),
        (too_long, REP_ERR_TOO_BIG),
    ] {
        let (end, replies) = after_structured(&[choice.clone(), later, go("a")]);
        assert_eq!(kinds_of(&replies)[2], kind);
        assert!(!has_context(end), "{kind:#x}");
    }
}

#[test]
fn contexts_need_replies_in_chunks() {
    for number in [OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT] {
        let input = [option(number, &queries("a", &["base:allocation"])), structured(), go("a")].concat();
        let (end, output) = run(&[export("a", false)], BOTH, &input);
        assert_eq!(kinds(output), [REP_ERR_INVALID, REP_ACK, REP_INFO, REP_ACK]);
        assert!(!has_context(end));
    }
    let input = [option(OPT_EXTENDED_HEADERS, b""), set("", &["base:allocation"]), go("a")].concat();
    assert!(has_context(run(&[export("a", false)], BOTH, &input).0));
}

#[test]
fn lengths_are_checked_and_bounded() {
    let mut extra = queries("a", &["base:"]);
    extra.push(0);
    let mut many_claimed = queries("a", &[]);
    many_claimed.splice(5.., u32::MAX.to_be_bytes());
    let mut long_claimed = queries("a", &["base:"]);
    long_claimed.splice(9..13, u32::MAX.to_be_bytes());
    for data in [vec![], vec![0; 4], extra, many_claimed, long_claimed, queries("a", &[])[..7].to_vec()] {
        let (_, replies) = after_structured(&[option(OPT_LIST_META_CONTEXT, &data)]);
        assert_eq!(kinds_of(&replies), [REP_ERR_INVALID], "{data:?}");
    }
    let long = "n".repeat(STRING_BYTES_MAX + 1);
    for data in [queries(&long, &[]), queries("a", &[&long]), queries("a", &[""; META_QUERIES_MAX as usize + 1])] {
        let (_, replies) = after_structured(&[option(OPT_LIST_META_CONTEXT, &data)]);
        assert_eq!(kinds_of(&replies), [REP_ERR_TOO_BIG]);
    }
}
