//! Stories about directories of certificates: what is loaded, what is refused at the start and in which words, and who is
//! let in by what was loaded.

use std::fs;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::authority::{Authority, Side, Validity};
use super::*;

const REQUIRED: ClientCertificates = ClientCertificates::Required;

fn server_error(dir: &Path) -> TlsError {
    server_config(dir, REQUIRED).expect_err("the server's certificates cannot be used")
}

/// Connects a client to a server in memory; what the server learns of the client's names, or why it came to nothing.
async fn meet(server: &Path, client: &Path, name: &str) -> Result<Vec<String>, String> {
    let server = server_config(server, REQUIRED).expect("a server");
    let client = client_config(client).expect("a client");
    let (here, there) = tokio::io::duplex(1 << 16);
    let accepting = tokio::spawn(async move {
        let mut stream = TlsAcceptor::from(server).accept(here).await.map_err(|e| format!("server: {e}"))?;
        stream.write_all(b"x").await.map_err(|e| e.to_string())?;
        let peer = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names_of);
        Ok::<_, String>(peer.unwrap_or_default())
    });
    let name = ServerName::try_from(name.to_owned()).expect("a name");
    let connected = TlsConnector::from(client).connect(name, there).await;
    let mut stream = connected.map_err(|e| format!("client: {e}"))?;
    // In TLS 1.3 a client hears only with the first bytes that the server does not want it.
    let heard = stream.read_u8().await;
    let names = accepting.await.expect("no panic")?;
    heard.map(|_| names).map_err(|e| format!("client: {e}"))
}

#[tokio::test]
async fn both_sides_know_each_other_by_name() {
    let authority = Authority::new();
    let (server, client) = (authority.dir(Side::Server, "a"), authority.dir(Side::Client, "engine"));
    assert_eq!(meet(&server, &client, "a").await, Ok(vec!["engine".to_owned()]));
    let refused = meet(&server, &client, "b").await.expect_err("a is not b");
    assert!(refused.contains("not valid for name"), "{refused}");
}

#[tokio::test]
async fn neither_strangers_nor_revoked_certificates_are_let_in() {
    let (authority, other) = (Authority::new(), Authority::new());
    let (server, client) = (authority.dir(Side::Server, "a"), authority.dir(Side::Client, "engine"));
    let stranger = other.dir(Side::Client, "engine");
    fs::copy(server.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    assert!(meet(&server, &stranger, "a").await.expect_err("another CA").contains("UnknownIssuer"));
    authority.revoke(&server, "engine");
    assert!(meet(&server, &client, "a").await.expect_err("revoked").contains("Revoked"));
    authority.revoke(&client, "a");
    fs::remove_file(server.join("ca-crl.pem")).unwrap();
    assert!(meet(&server, &client, "a").await.expect_err("revoked").contains("Revoked"));
}

#[test]
fn a_missing_or_broken_file_is_named() {
    let authority = Authority::new();
    let dir = authority.dir(Side::Server, "a");
    for file in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        let path = dir.join(file);
        let whole = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let error = server_error(&dir);
        assert!(matches!(&error, TlsError::Read { path: p, .. } if *p == path), "{error}");
        assert!(error.remedy().contains("nbdcast certs"), "{}", error.remedy());
        fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        assert!(matches!(server_error(&dir), TlsError::NotPem { path: p } if p == path), "{file} cut off");
        fs::write(&path, "nothing\n").unwrap();
        assert!(matches!(server_error(&dir), TlsError::Empty { path: p, .. } if p == path), "{file} without content");
        fs::write(&path, whole).unwrap();
    }
    server_config(&dir, REQUIRED).expect("all is as it was");
    fs::remove_file(dir.join("ca-cert.pem")).unwrap();
    server_config(&dir, ClientCertificates::NotAsked).expect("nobody's certificate is to be checked");
    fs::write(dir.join("ca-crl.pem"), "nothing\n").unwrap();
    let client = authority.dir(Side::Client, "engine");
    fs::write(client.join("ca-crl.pem"), "nothing\n").unwrap();
    assert!(matches!(client_config(&client), Err(TlsError::Empty { .. })), "no list of revoked certificates");
}

#[test]
fn certificates_that_peers_would_refuse_are_refused_at_the_start() {
    let authority = Authority::new();
    let over = authority.dir_valid(Side::Server, "over", Validity::Over);
    assert!(matches!(server_error(&over), TlsError::Expired { .. }));
    let to_come = authority.dir_valid(Side::Server, "new", Validity::ToCome);
    assert!(matches!(server_error(&to_come), TlsError::NotYetValid { .. }));

    let (a, b) = (authority.dir(Side::Server, "a"), authority.dir(Side::Server, "b"));
    fs::copy(b.join("server-key.pem"), a.join("server-key.pem")).unwrap();
    assert!(matches!(server_error(&a), TlsError::KeyMismatch { key } if key == a.join("server-key.pem")));

    for file in ["cert", "key"] {
        fs::copy(b.join(format!("server-{file}.pem")), b.join(format!("client-{file}.pem"))).unwrap();
    }
    let error = client_config(&b).expect_err("a server's certificate is no client's");
    assert!(matches!(&error, TlsError::Unfit { .. }), "{error}");
}

#[test]
fn nothing_of_a_key_is_shown() {
    let authority = Authority::new();
    let dir = authority.dir(Side::Server, "a");
    let path = dir.join("server-key.pem");
    let key = fs::read_to_string(&path).unwrap();
    let body = key.lines().nth(1).unwrap();
    for broken in
        [key.replace("-----\n", "--x--\n"), key.replace("-----END", "----- END"), format!("-----BEGIN {body}")]
    {
        fs::write(&path, broken).unwrap();
        let error = server_error(&dir);
        let shown = format!("{error} {error:?}");
        assert!(!shown.contains(&body[..16]), "{shown}");
    }
}

#[test]
fn files_are_read_up_to_a_limit() {
    let authority = Authority::new();
    let dir = authority.dir(Side::Server, "a");
    let file = fs::File::create(dir.join("ca-cert.pem")).unwrap();
    file.set_len(FILE_BYTES_MAX + 1).unwrap();
    let too_large = |cause: &io::Error| cause.kind() == io::ErrorKind::FileTooLarge;
    assert!(matches!(server_error(&dir), TlsError::Read { cause, .. } if too_large(&cause)));
}

#[test]
fn names_of_something_else_are_none() {
    assert!(names_of(&CertificateDer::from(vec![0x30; 100])).is_empty());
}
