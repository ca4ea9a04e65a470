//! TLS in its three modes, and exports that are not for everybody.

use super::*;
use crate::nbd::access::{AccessRules, Network};

fn started(offer: Offer<'_>) -> Handshake<'_> {
    started_with(offer, BOTH)
}

fn started_with(offer: Offer<'_>, flags: u32) -> Handshake<'_> {
    let mut handshake = Handshake::new(offer, Client::default());
    feed(&mut handshake, &flags.to_be_bytes()).0.unwrap();
    handshake
}

fn go(export: &str) -> Vec<u8> {
    option(OPT_GO, &info_data(export, &[]))
}

fn with_tls(tls: TlsMode, exports: &[ExportInfo]) -> Offer<'_> {
    Offer { tls, ..offer(exports) }
}

#[test]
fn without_tls_starttls_is_refused_and_the_handshake_goes_on() {
    let exports = [export("a", false)];
    let mut handshake = started(offer(&exports));
    let (end, output) = feed(&mut handshake, &[option(OPT_STARTTLS, b""), go("a")].concat());
    assert_eq!(end, Ok(plain(0)));
    assert_eq!(kinds(output), [REP_ERR_POLICY, REP_INFO, REP_ACK]);
}

#[test]
fn tls_forgets_what_was_agreed_on_before() {
    let exports = [export("a", false)];
    for style in [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS] {
        let mut handshake = started(with_tls(TlsMode::On, &exports));
        let set = option(OPT_SET_META_CONTEXT, b"\0\0\0\x01a\0\0\0\x01\0\0\0\x0fbase:allocation");
        let (end, output) = feed(&mut handshake, &[option(style, b""), set, option(OPT_STARTTLS, b"")].concat());
        assert_eq!(end, Ok(Progress::StartTls));
        assert_eq!(kinds(output), [REP_ACK, REP_META_CONTEXT, REP_ACK, REP_ACK]);
        handshake.on_tls(vec![]);
        assert_eq!(feed(&mut handshake, &go("a")).0, Ok(plain(0)));
    }
}

#[test]
fn unencrypted_bytes_behind_starttls_are_never_looked_at() {
    let exports = [export("a", false)];
    let mut handshake = started(with_tls(TlsMode::On, &exports));
    let (end, output) = feed(&mut handshake, &[option(OPT_STARTTLS, b""), go("a")].concat());
    assert_eq!(end, Err(HandshakeError::InputBehindStartTls));
    assert_eq!(kinds(output), [REP_ACK]);

    let mut handshake = started(with_tls(TlsMode::On, &exports));
    feed(&mut handshake, &option(OPT_STARTTLS, b"")).0.unwrap();
    assert_eq!(feed(&mut handshake, b"x").0, Err(HandshakeError::InputBehindStartTls));
}

#[test]
fn starttls_carries_no_data_and_comes_once() {
    let mut handshake = started(with_tls(TlsMode::On, &[]));
    let (end, output) = feed(&mut handshake, &option(OPT_STARTTLS, b"x"));
    assert_eq!((end, kinds(output)), (Ok(Progress::NeedInput), vec![REP_ERR_INVALID]));
    assert_eq!(feed(&mut handshake, &option(OPT_STARTTLS, b"")).0, Ok(Progress::StartTls));
    handshake.on_tls(vec![]);
    let (end, output) = feed(&mut handshake, &option(OPT_STARTTLS, b""));
    assert_eq!((end, kinds(output)), (Ok(Progress::NeedInput), vec![REP_ERR_INVALID]));
}

#[test]
fn a_server_that_requires_tls_tells_nothing_without() {
    let exports = [export("a", false)];
    let mut handshake = started(with_tls(TlsMode::Require, &exports));
    for number in [OPT_LIST, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS, 99] {
        let (end, output) = feed(&mut handshake, &option(number, &[0; 100_000]));
        assert_eq!((end, kinds(output)), (Ok(Progress::NeedInput), vec![REP_ERR_TLS_REQD]), "{number}");
    }
    assert_eq!(feed(&mut handshake, &option(OPT_STARTTLS, b"")).0, Ok(Progress::StartTls));
    handshake.on_tls(vec![]);
    assert_eq!(feed(&mut handshake, &go("a")).0, Ok(plain(0)));

    let mut leaving = started(with_tls(TlsMode::Require, &exports));
    assert_eq!(feed(&mut leaving, &option(OPT_ABORT, b"")).0, Ok(Progress::Aborted));
    let mut old = started(with_tls(TlsMode::Require, &exports));
    assert_eq!(feed(&mut old, &option(OPT_EXPORT_NAME, b"a")).0, Err(HandshakeError::NotPermitted));
}

#[test]
fn clients_without_fixed_newstyle_get_no_tls() {
    let exports = [export("a", false)];
    let mut handshake = started_with(with_tls(TlsMode::On, &exports), CLIENT_NO_ZEROES);
    let (end, output) = feed(&mut handshake, &option(OPT_STARTTLS, b""));
    assert_eq!((end, kinds(output)), (Ok(Progress::NeedInput), vec![REP_ERR_POLICY]));
    let mut handshake = started_with(with_tls(TlsMode::Require, &exports), 0);
    for number in [OPT_LIST, OPT_STARTTLS] {
        assert_eq!(kinds(feed(&mut handshake, &option(number, b"")).1), [REP_ERR_POLICY]);
    }
}

fn guarded() -> [ExportInfo; 3] {
    let elsewhere = Network { address: "192.0.2.0".parse().unwrap(), prefix_bits: 24 };
    let addresses = AccessRules { addresses: vec![elsewhere], names: vec![] };
    let names = AccessRules { addresses: vec![], names: vec!["backup.example".into()] };
    let with = |name, access| ExportInfo { access, ..export(name, false) };
    [export("open", false), with("elsewhere", addresses), with("named", names)]
}

/// A client from 198.51.100.1.
fn visitor(exports: &[ExportInfo], tls: TlsMode) -> Handshake<'_> {
    let client = Client { address: Some("198.51.100.1".parse().unwrap()), ..Client::default() };
    let mut handshake = Handshake::new(with_tls(tls, exports), client);
    let hello = [BOTH.to_be_bytes().to_vec(), option(OPT_STRUCTURED_REPLY, b"")].concat();
    feed(&mut handshake, &hello).0.unwrap();
    handshake
}

fn listed(handshake: &mut Handshake<'_>) -> Vec<u8> {
    let names = replies(feed(handshake, &option(OPT_LIST, b"")).1);
    names.iter().filter(|(_, kind, _)| *kind == REP_SERVER).map(|(_, _, body)| body[4]).collect()
}

fn set_meta_context(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(0_u32.to_be_bytes());
    option(OPT_SET_META_CONTEXT, &data)
}

#[test]
fn exports_are_shown_and_given_to_those_who_may_use_them() {
    let exports = guarded();
    let mut handshake = visitor(&exports, TlsMode::On);
    assert_eq!(listed(&mut handshake), b"o");
    for (name, info, set) in [
        ("open", vec![REP_INFO, REP_ACK], REP_ACK),
        ("elsewhere", vec![REP_ERR_POLICY], REP_ERR_POLICY),
        ("named", vec![REP_ERR_TLS_REQD], REP_ERR_POLICY),
        ("nothing", vec![REP_ERR_UNKNOWN], REP_ERR_UNKNOWN),
    ] {
        let data = info_data(name, &[]);
        assert_eq!(kinds(feed(&mut handshake, &option(OPT_INFO, &data)).1), info, "{name}");
        assert_eq!(kinds(feed(&mut handshake, &set_meta_context(name)).1), [set], "{name}");
    }
    assert_eq!(kinds(feed(&mut handshake, &go("elsewhere")).1), [REP_ERR_POLICY]);
    feed(&mut handshake, &option(OPT_STARTTLS, b"")).0.unwrap();
    handshake.on_tls(vec!["Backup.Example".into()]);
    assert_eq!(listed(&mut handshake), b"on");
    assert_eq!(feed(&mut handshake, &go("named")).0, Ok(plain(2)));
}

#[test]
fn a_wrong_name_is_refused_for_good_and_no_tls_is_never_asked_for_in_vain() {
    let exports = guarded();
    let mut handshake = visitor(&exports, TlsMode::Require);
    feed(&mut handshake, &option(OPT_STARTTLS, b"")).0.unwrap();
    handshake.on_tls(vec!["other.example".into()]);
    assert_eq!(kinds(feed(&mut handshake, &go("named")).1), [REP_ERR_POLICY]);
    let mut handshake = visitor(&exports, TlsMode::Off);
    assert_eq!(kinds(feed(&mut handshake, &go("named")).1), [REP_ERR_POLICY]);
}

#[test]
fn export_name_of_an_export_for_others_ends_the_connection() {
    let exports = guarded();
    for name in ["elsewhere", "named"] {
        let mut handshake = visitor(&exports, TlsMode::On);
        let end = feed(&mut handshake, &option(OPT_EXPORT_NAME, name.as_bytes())).0;
        assert_eq!(end, Err(HandshakeError::NotPermitted));
    }
}
