//! Numbers of users and groups by their names, as the files of the system have them. Asks no directory service.

use std::fs;
use std::io;
use std::path::Path;

const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// The number of a user, given by name or number; `None` if there is no such name.
pub(super) fn user_number(user: &str) -> io::Result<Option<u32>> {
    number_in(Path::new(USERS), user)
}

/// The number of a group, given by name or number; `None` if there is no such name.
pub(super) fn group_number(group: &str) -> io::Result<Option<u32>> {
    number_in(Path::new(GROUPS), group)
}

fn number_in(file: &Path, account: &str) -> io::Result<Option<u32>> {
    match account.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Ok(number_of(&fs::read_to_string(file)?, account)),
    }
}

/// Both files hold a name, a password and a number per line, and more, with colons in between.
fn number_of(text: &str, account: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_it = fields.next() == Some(account);
        let number = fields.nth(1)?.parse().ok()?;
        is_it.then_some(number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_of_this_system() {
        assert_eq!(user_number("root").unwrap(), Some(0));
        assert_eq!(group_number("root").unwrap(), Some(0));
        assert_eq!(user_number("1234567").unwrap(), Some(1_234_567));
        assert_eq!(user_number("nobody-of-this-name").unwrap(), None);
    }

    #[test]
    fn lines_that_are_no_accounts_are_passed_over() {
        let text = "# comment\n\nqemu\nqemu:x:many:\nqemu-kvm:x:7:\nqemu:x:64055:64055:QEMU:/:/bin/false\n";
        assert_eq!(number_of(text, "qemu"), Some(64055));
        assert_eq!(number_of(text, "kvm"), None);
    }
}
