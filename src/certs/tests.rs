//! Stories about a set of certificates: it fits together, it grows, and nothing of it is ever overwritten.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use listener_agent::tls::{ClientCertificates, client_config, is_issued_by, names_of, server_config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::*;

fn wanted(agents: &[&str], clients: &[&str]) -> Wanted {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    Wanted { agents: owned(agents), clients: owned(clients), hosts: vec!["nbd.example".to_owned()], days: 30 }
}

fn names_in(path: &Path) -> Vec<String> {
    names_of(&CertificateDer::from_pem_file(path).expect("a certificate"))
}

#[test]
fn each_participant_gets_what_its_side_needs() {
    let out = tempfile::tempdir().expect("a directory");
    let out = out.path().join("new/certs");
    let members = make(&out, &wanted(&["a", "b"], &["guest"])).expect("certificates");
    let made: Vec<String> = members.iter().map(|member| member.holder.to_string()).collect();
    assert_eq!(made, ["ca", "engine", "agent-a", "agent-b", "client-guest"]);
    assert!(members.iter().all(|member| !member.kept));
    let dir = |name: &str| out.join(name);
    for server in ["engine", "agent-a", "agent-b"] {
        server_config(&dir(server), ClientCertificates::Required).expect(server);
    }
    for client in ["engine", "client-guest"] {
        client_config(&dir(client)).expect(client);
    }
    assert_eq!(names_in(&dir("engine/client-cert.pem")), ["engine"]);
    assert_eq!(names_in(&dir("agent-b/server-cert.pem")), ["b"]);
    assert_eq!(names_in(&dir("client-guest/client-cert.pem")), ["guest"]);
    let hosts = names_in(&dir("engine/server-cert.pem"));
    assert!(hosts.contains(&"localhost".to_owned()) && hosts.contains(&"nbd.example".to_owned()), "{hosts:?}");
}

#[test]
fn keys_are_for_their_owner_only_and_go_nowhere_but_where_they_are_used() {
    let out = tempfile::tempdir().expect("a directory");
    let members = make(out.path(), &wanted(&["a"], &["guest"])).expect("certificates");
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    let mut keys = 0;
    for member in members {
        assert_eq!(mode(&member.dir), 0o700);
        for file in fs::read_dir(&member.dir).expect("a directory") {
            let path = file.expect("a file").path();
            let is_key = path.to_string_lossy().ends_with("-key.pem");
            assert_eq!(mode(&path), if is_key { 0o600 } else { 0o644 }, "{}", path.display());
            keys += usize::from(is_key);
            assert!(!path.ends_with("ca-key.pem") || member.holder == Holder::Authority);
        }
    }
    assert_eq!(keys, 5, "the CA's, the engine's two, the agent's, the client's");
}

#[test]
fn a_set_grows_and_what_is_there_stays() {
    let out = tempfile::tempdir().expect("a directory");
    let path = out.path();
    make(path, &wanted(&["a"], &[])).expect("certificates");
    let engine = fs::read(path.join("engine/client-key.pem")).expect("a key");
    // An attempt that was interrupted.
    fs::create_dir(path.join(".agent-b.new")).expect("a directory");
    let members = make(path, &wanted(&["a", "b"], &["guest"])).expect("more certificates");
    let kept: Vec<bool> = members.iter().map(|member| member.kept).collect();
    assert_eq!(kept, [true, true, true, false, false]);
    assert_eq!(fs::read(path.join("engine/client-key.pem")).expect("a key"), engine);
    assert!(!path.join(".agent-b.new").exists());
    let read = |name: &str| fs::read_to_string(path.join(name)).expect(name);
    assert!(is_issued_by(&read("agent-b/server-cert.pem"), &read("engine/ca-cert.pem")), "both are of one CA");
}

#[test]
fn commands_that_run_at_once_make_one_set() {
    const AT_ONCE: usize = 4;
    for _ in 0..10 {
        let out = tempfile::tempdir().expect("a directory");
        let out = out.path().join("certs");
        let start = std::sync::Barrier::new(AT_ONCE);
        let sets: Vec<Vec<Member>> = std::thread::scope(|scope| {
            let command = || {
                start.wait();
                make(&out, &wanted(&["a"], &["guest"])).expect("certificates")
            };
            let commands: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(command)).collect();
            commands.into_iter().map(|command| command.join().expect("no panic")).collect()
        });
        for (index, made) in sets[0].iter().enumerate() {
            let makers = sets.iter().filter(|set| !set[index].kept).count();
            assert_eq!(makers, 1, "one of them made {}", made.holder);
        }
        let read = |name: &str| fs::read_to_string(out.join(name)).expect(name);
        let authority = read("ca/ca-cert.pem");
        for (dir, side) in
            [("engine", "server"), ("engine", "client"), ("agent-a", "server"), ("client-guest", "client")]
        {
            assert!(is_issued_by(&read(&format!("{dir}/{side}-cert.pem")), &authority), "{dir}/{side}");
            assert_eq!(read(&format!("{dir}/ca-cert.pem")), authority);
        }
        make(&out, &wanted(&["b"], &[])).expect("the CA's certificate goes with its key");
    }
}

#[test]
fn nothing_is_issued_without_the_ca_as_it_was_made() {
    let (one, other) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
    for out in [&one, &other] {
        make(out.path(), &wanted(&[], &[])).expect("certificates");
    }
    fs::copy(other.path().join("ca/ca-cert.pem"), one.path().join("ca/ca-cert.pem")).expect("copied");
    let error = make(one.path(), &wanted(&["a"], &[])).expect_err("the key is another CA's");
    assert!(matches!(error, CertsError::ForeignAuthority { .. }), "{error}");
    fs::remove_file(other.path().join("ca/ca-key.pem")).expect("removed");
    let error = make(other.path(), &wanted(&["a"], &[])).expect_err("the key is gone");
    assert!(error.remedy().contains("where the key of the CA is"), "{error}");
    for out in [&one, &other] {
        assert!(!out.path().join("agent-a").exists());
    }
}

#[test]
fn names_and_hosts_are_what_certificates_can_bear() {
    assert!(is_name("a") && is_name("node-a.example") && is_name("node_a") && is_name("A1"));
    for bad in ["", "10", "10.0.0.1", "-a", "a b", "a/b", "../a", "*"] {
        assert!(!is_name(bad), "{bad}");
    }
    assert!(is_host("10.0.0.1") && is_host("::1") && is_host("nbd.example") && !is_host("a:1"));
}
